"""The strict YAML reader against PyYAML itself."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qtool.recipe.yaml import parse

text = st.text(st.characters(exclude_categories=["C"]), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12
)


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@given(data=documents, flow=st.sampled_from([True, False, None]))
def test_plain_data_reads_as_pyyaml_reads_it(data: Any, flow: bool | None) -> None:
    written = yaml.dump(data, Dumper=NoAliases, default_flow_style=flow, allow_unicode=True)
    document = parse(written.encode())
    assert document.problems == []
    assert document.data == yaml.safe_load(written)


@given(st.binary(max_size=64) | text.map(str.encode))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    document = parse(data)
    assert document.problems or document.data == yaml.safe_load(data.decode("utf-8-sig"))


def test_lines() -> None:
    document = parse(b"a: 1\nb:\n  - x: 2\n    y:\n      z: 3\n  - 4\n")
    assert document.lines == {
        (): 1,
        ("a",): 1,
        ("b",): 2,
        ("b", 0): 3,
        ("b", 0, "x"): 3,
        ("b", 0, "y"): 4,
        ("b", 0, "y", "z"): 5,
        ("b", 1): 6,
    }


def test_a_bomb_of_aliases_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    document = parse("\n".join(lines).encode())
    assert document.data is None
    assert [problem.line for problem in document.problems] == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2024-02-31: 1", "a key must be text"),
        ("a: 2024-02-31", "not a valid timestamp"),
        ("a: !!int ''", "not a valid int"),
        ("a: !!float x", "not a valid float"),
        ("a: !!bool ''", "not a valid bool"),
        ("a: 1" + ":10" * 50_000, "not a valid int"),
        ("? !!str [x]\n: 1", "a key must be text"),
        ("[" * 5000, "nested more than"),
    ],
)
def test_what_is_no_value_is_a_problem_with_a_line(text: str, message: str) -> None:
    document = parse(text.encode())
    assert [problem.line for problem in document.problems] == [1]
    assert message in document.problems[0].message
