"""Mermaid's flowcharts as pictures in the documentation's site: a hook of mkdocs (see mkdocs.yml).

The theme would fetch a program from elsewhere to draw them. Only what the documents use is understood: arrows between
names that may have a label, several names joined by `&`, and chains of arrows.
"""

from __future__ import annotations

import itertools
import re
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _GAP, _LEVEL = 128, 34, 14, 74  # pixels: a box, between boxes, from one level to the next


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with its flowcharts drawn."""
    return re.sub(r"^```mermaid\n(.*?)^```$", lambda found: svg(found[1]), markdown, flags=re.MULTILINE | re.DOTALL)


def parse(text: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Labels by name, in their order, and arrows."""
    labels: dict[str, str] = {}
    arrows = []
    for line in text.splitlines()[1:]:
        ends = [re.findall(r'([\w]+)(?:\["([^"]*)"\])?', end) for end in line.split("-->")]
        for name, label in itertools.chain(*ends):
            labels[name] = label or labels.get(name, name)
        for above, below in itertools.pairwise(ends):
            arrows += [(a, b) for (a, _), (b, _) in itertools.product(above, below)]
    return labels, arrows


def levels(names: list[str], arrows: list[tuple[str, str]]) -> list[list[str]]:
    """The names from the top down, each below all that point to it; those of a level are near what they hang on."""
    depth = dict.fromkeys(names, 0)
    for _ in names:
        for a, b in arrows:
            depth[b] = max(depth[b], depth[a] + 1)
    rows = [[name for name in names if depth[name] == level] for level in range(max(depth.values()) + 1)]
    at = {name: i - (len(row) - 1) / 2 for row in rows for i, name in enumerate(row)}
    for row in rows[1:]:
        above = {name: [at[a] for a, b in arrows if b == name] for name in row}
        row.sort(key=lambda name: sum(above[name]) / len(above[name]))
        at |= {name: i - (len(row) - 1) / 2 for i, name in enumerate(row)}
    return rows


def svg(text: str) -> str:
    """A drawing in the page's colours."""
    labels, arrows = parse(text)
    rows = levels(list(labels), arrows)
    wide = max(map(len, rows)) * (_WIDTH + _GAP) + 2 * _GAP
    place = {
        name: (wide / 2 + (i - (len(row) - 1) / 2) * (_WIDTH + _GAP), _GAP + level * _LEVEL)
        for level, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    drawn = []
    for a, b in arrows:
        (x, y), (to_x, to_y) = place[a], place[b]
        y += _HEIGHT
        middle = (y + to_y) / 2
        drawn.append(f'<path d="M{x:g} {y:g}C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y - 3:g}"/>')
    for name, (x, y) in place.items():
        drawn.append(f'<rect x="{x - _WIDTH / 2:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>')
        drawn.append(f'<text x="{x:g}" y="{y + _HEIGHT / 2 + 5:g}">{escape(labels[name])}</text>')
    tall = _GAP + (len(rows) - 1) * _LEVEL + _HEIGHT + _GAP
    head = '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    return (
        f'<div class="flowchart"><svg viewBox="0 0 {wide:g} {tall:g}" role="img"><defs>{head}'
        f'<path d="M0 0L10 5L0 10z"/></marker></defs>{"".join(drawn)}</svg></div>\n'
    )
