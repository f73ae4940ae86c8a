"""The documents name what exists, and their links lead somewhere."""

from __future__ import annotations

import ast
import html
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import qtool
from tests import browser, flowchart, reference
from tests.test_architecture import FILES, GRAPH, LAYERS, place

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
FOR_DEVELOPERS = (ARCHITECTURE, CONTRIBUTING)
README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = tuple(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "changelog.md")
ALL = (CONTRIBUTING, README, CHANGELOG, *PAGES, ROOT / "configs" / "README.md")
LINES = 150  # that README has at most

_FOLDERS = "qtool|tests|configs|recipes|docs"
_ELSEWHERE = re.compile(r"/(?:mine|balanced)\.py$|^qtool/(?:_data/|config\.toml$)")  # of examples, wheels and users
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each block of code."""
    yield from _BLOCK.findall(document.read_text(encoding="utf-8"))


def paths(text: str) -> set[str]:
    """Files and folders of the repository that a text names."""
    return set(re.findall(rf"(?<![\w/.-])(?:{_FOLDERS})/[\w./-]*\w/?(?![\w{{*-])", text))


def modules(text: str) -> set[str]:
    """Names below qtool that a text uses, such as qtool.quant.types or qtool.quantize."""
    return set(re.findall(r"(?<![\w.-])qtool(?:\.[A-Za-z_]\w*)+", text))


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or a name that one defines at its top."""
    if name in FILES:
        return True
    module, _, attribute = name.rpartition(".")
    if module not in FILES:
        return False
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return attribute in defined


@pytest.mark.parametrize("document", ALL, ids=lambda document: document.name)
def test_paths_that_are_named_exist(document: Path) -> None:
    found = {path for path in paths(document.read_text(encoding="utf-8")) if not _ELSEWHERE.search(path)}
    assert {path for path in found if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("document", FOR_DEVELOPERS, ids=lambda document: document.name)
def test_modules_that_are_named_exist(document: Path) -> None:
    found = modules(document.read_text(encoding="utf-8"))
    assert found
    assert {name for name in found if not exists(name) and not name.endswith(".json")} == set()


def test_names_beside_a_file_are_in_it() -> None:
    """`name` in `file.py`, `name` (`file.py`), and `name`, as `file.py` does: what a reader will search for."""
    text = re.sub(r"\s+", " ", ARCHITECTURE.read_text(encoding="utf-8"))
    pairs = re.findall(r"`(\w+)`(?: in | \()`((?:qtool|tests)/[\w/]+\.py)`", text)
    pairs += re.findall(r"`([a-z_]+)`, as `((?:qtool|tests)/[\w/]+\.py)` does", text)  # a class can stand for another
    assert pairs
    missing = {(name, file) for name, file in pairs if not re.search(rf"\b{name}\b", (ROOT / file).read_text("utf-8"))}
    assert missing == set()


@pytest.mark.parametrize("document", ALL, ids=lambda document: document.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", _BLOCK.sub("", text)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path) if path else document
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", _BLOCK.sub("", there.read_text(encoding="utf-8")), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target


def rooms() -> list[list[str]]:
    """The packages of the plain list in the architecture, line by line."""
    lines = re.findall(r"^- ((?:`qtool\.[\w.]+`(?:, )?)+):", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.findall(r"`([\w.]+)`", line) for line in lines]


def test_the_list_of_rooms_has_the_order_that_imports_have() -> None:
    places = {name: line for line, names in enumerate(LAYERS) for name in names}
    listed = [name for names in rooms() for name in names]
    assert sorted(listed) == sorted(name for name in places if name != "qtool.__main__")
    assert [places[name] for name in listed] == sorted(places[name] for name in listed)


def test_the_arrows_of_the_picture_are_imports() -> None:
    (picture,) = (text for language, text in blocks(ARCHITECTURE) if language == "mermaid")
    named = {"cli": ("cli", "api"), "types": ("quant.types",)}
    imports = {
        (place(name)[1], place(other)[1]) for name, others in GRAPH.items() if name != "qtool" for other in others
    }
    arrows = []
    for line in re.sub(r"\[.*?\]", "", picture).splitlines()[1:]:
        ends = [re.findall(r"\w+", end) for end in line.split("-->")]
        arrows += [(a, b) for above, below in itertools.pairwise(ends) for a in above for b in below]
    assert len(arrows) > 20
    for a, b in arrows:
        (below,) = named.get(b, (b,))
        assert {(f"qtool.{above}", f"qtool.{below}") for above in named.get(a, (a,))} & imports, (a, b)


def test_every_package_has_a_room() -> None:
    listed = {name for names in rooms() for name in names}
    packages = {path.parent.name for path in (ROOT / "qtool").glob("*/__init__.py")}
    assert {name for name in packages if f"qtool.{name}" not in listed} == set()


@pytest.mark.parametrize("document", ALL, ids=lambda document: document.name)
def test_examples_compile_and_import_what_exists(document: Path) -> None:
    for language, code in blocks(document):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("qtool"):
                for alias in node.names:
                    assert exists(f"{node.module}.{alias.name}"), ast.unparse(node)
            elif isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(alias.name.partition(".")[0]) for alias in node.names)


def test_what_the_documents_say_of_commands_is_what_there_is() -> None:
    from qtool.cli.app import COMMANDS

    for document in (*FOR_DEVELOPERS, README, *PAGES):
        text = document.read_text(encoding="utf-8")
        commands = set(re.findall(r"(?:`|\$ |[a-z] \| |\$\()qtool ([a-z][a-z-]*)", text))
        assert commands <= {*COMMANDS}, document.name


def options_of(words: list[str]) -> set[str] | None:
    """The options of the command that a line begins with; None where there is no such command."""
    from qtool.cli.app import COMMANDS, load

    if words[0] not in COMMANDS:
        return None
    command: Any = load(words[0])
    if below := getattr(command, "commands", None):
        if len(words) < 2 or words[1] not in below:
            return None
        command = below[words[1]]
    return {"--help", *(name for param in command.params for name in (*param.opts, *param.secondary_opts))}


def problem_of(words: list[str]) -> str | None:
    """What the command line would say of these words before it does anything, as click says it; None if nothing."""
    from qtool.cli.app import COMMANDS, load

    command: Any = load(words[0]) if words[0] in COMMANDS else None
    rest = words[1:]
    if command is not None and rest and (below := getattr(command, "commands", None)):
        command, rest = below.get(rest[0]), rest[1:]
    if command is None:
        return f"no such command: {' '.join(words)}"
    try:
        command.make_context(words[0], rest)
    except SystemExit as ended:
        return None if ended.code == 0 else f"exit code {ended.code}"
    except Exception as error:
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        return str(format_message())
    return None


def called(document: Path) -> Iterator[tuple[str, list[str]]]:
    """Each call of qtool in a document's blocks for a terminal and in its inline code: its text, and its words."""
    text = document.read_text(encoding="utf-8")
    lines = [line[2:] for language, code in blocks(document) if language == "console" for line in code.splitlines()]
    inline = re.findall(r"`(qtool [^`]+)`", re.sub(r"\s+", " ", _BLOCK.sub("", text)))
    for line in (*lines, *inline):
        for part in re.split(r"\||\$\(|&&", re.sub(r" # .*", "", line)):
            words = part.strip(' ")').split()
            if len(words) > 1 and words[0] == "qtool":
                yield part, words[1:]


@pytest.mark.parametrize("document", ALL, ids=lambda document: document.name)
def test_options_of_commands_in_the_documents_exist(document: Path) -> None:
    for line, words in called(document):
        if words[0].startswith("-") or words[0] in ("COMMAND", "NAME"):
            continue
        known = options_of(words)
        assert known is not None, line
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known, (line, given - known)


def test_calls_are_found() -> None:
    assert sum(1 for document in ALL for _ in called(document)) > 60


def commands_shown(document: Path) -> Iterator[str]:
    """Each call of qtool in the blocks for a terminal, without what a shell does with it."""
    for language, code in blocks(document):
        if language not in ("console", "bash", "text"):
            continue
        for line in re.findall(r"^\$ (.*)$", code.replace("\\\n", " "), re.MULTILINE):
            inner = re.sub(r"\"?\$\((qtool [^)]*)\)\"?", "MODEL", line)
            for each in (*re.findall(r"\$\((qtool [^)]*)\)", line), inner):
                for part in re.split(r"[|] | && ", each):
                    if part.strip().startswith("qtool "):
                        yield part.strip()


@pytest.mark.parametrize("document", ALL, ids=lambda document: document.name)
def test_commands_in_the_documents_parse(document: Path) -> None:
    """With their values, and with all arguments that they need; what they name need not exist."""
    problems = {}
    for line in commands_shown(document):
        words = shlex.split(line, comments=True)[1:]
        plain = itertools.takewhile(lambda word: not re.match(r"[<>]", word), words)
        if not words[0].startswith("-") and (problem := problem_of(list(plain))):
            problems[line] = problem
    assert problems == {}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("generate --prompt a", "Missing argument"),
        ("quantize m --samples many", "--samples"),
        ("quantize m --engine other", "--engine"),
        ("eval m --nothing", "No such option"),
        ("recipes nothing", "no such command"),
        ("nothing", "no such command"),
    ],
)
def test_what_does_not_parse_is_found(words: str, problem: str) -> None:
    assert problem in str(problem_of(words.split()))


def test_the_page_of_commands_has_every_option() -> None:
    page = reference.markdown()
    for name, command in reference.commands():
        _, _, rest = page.partition(f"\n## qtool {name}\n")
        section = rest.partition("\n## ")[0]
        assert section, name
        shown = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", page.partition("\n## ")[0] + section))
        assert {option for param in command.params for option in param.opts if option.startswith("-")} <= shown, name
    example = "$ qtool quantize ./DeepSeek-R1 --recipe deepseek-r1-osl --memory 8GB --workers 8 --resume"
    assert example in page.splitlines()


@pytest.mark.parametrize("name", reference.FUNCTIONS)
def test_the_page_of_python_has_every_argument(name: str) -> None:
    section = reference.function(name, getattr(qtool, name))
    code = section.partition("```python\n")[2].partition("```")[0]
    tree = ast.parse(f"def {code.removeprefix('qtool.').rstrip()}: ...")  # it is Python
    assert isinstance(tree.body[0], ast.FunctionDef)
    arguments = tree.body[0].args
    names = [each.arg for each in (*arguments.args, *arguments.kwonlyargs, *filter(None, [arguments.kwarg]))]
    assert names == list(inspect.signature(getattr(qtool, name)).parameters)
    assert section.count("\n- `") > 1


def test_the_page_of_python_has_every_function() -> None:
    assert {*reference.FUNCTIONS} == {name for name in qtool._API if name[0].islower()}


def test_every_command_is_in_a_guide() -> None:
    guides = "".join(page.read_text(encoding="utf-8") for page in (README, *PAGES))
    assert [name for name, _ in reference.commands() if f"qtool {name}" not in guides] == []


def test_flowcharts_are_drawn_with_every_name_and_arrow() -> None:
    text = 'flowchart TD\n    a["one <1>"] --> b & c --> d\n    a --> d\n'
    assert flowchart.parse(text) == (
        {"a": "one <1>", "b": "b", "c": "c", "d": "d"},
        [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("a", "d")],
    )
    assert flowchart.levels(list("abcd"), flowchart.parse(text)[1]) == [["a"], ["b", "c"], ["d"]]
    (picture,) = (text for language, text in blocks(ARCHITECTURE) if language == "mermaid")
    labels, arrows = flowchart.parse(picture)
    drawn = ElementTree.fromstring(flowchart.svg(picture))
    boxes, shown = (list(drawn.iter(tag)) for tag in ("rect", "text"))
    assert sorted(str(each.text) for each in shown) == sorted(labels.values())
    assert len(list(drawn.iter("path"))) == len(arrows) + 1  # and the arrows' head
    places = [tuple(float(box.attrib[key]) for key in ("x", "y", "width", "height")) for box in boxes]
    for (x, y, width, height), (other_x, other_y, *_) in itertools.combinations(places, 2):
        assert abs(x - other_x) >= width or abs(y - other_y) >= height


def test_readme_is_one_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    assert "$ qtool quantize" in "\n".join(text.splitlines()[:24])  # the first screen


def test_captures_in_readme_are_what_the_commands_printed() -> None:
    """`python -m tests.captures` writes the files from real runs, and the block in README."""
    (quoted,) = re.findall(r"<!-- captures: begin.*?-->\n(.*?)<!-- captures: end -->", README.read_text("utf-8"), re.S)
    shown = re.findall(r"```text\n(.*?)```", quoted, re.DOTALL)
    assert len(shown) == 3
    for text, name in zip(shown, ("quantize", "eval", "generate"), strict=True):
        assert text == (ROOT / "docs" / "captures" / f"{name}.txt").read_text(encoding="utf-8")


def test_pictures_are_small_and_exist() -> None:
    for document in (README, *PAGES):
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            file = document.parent / target
            assert 200 < file.stat().st_size < 250_000, target


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built."""
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_and_its_links_lead_somewhere(site: Path) -> None:
    pages = {path.parent.name for path in site.glob("*/index.html")}
    assert {page.stem for page in PAGES} - {"index"} <= pages
    for page in site.rglob("*.html"):  # nothing is loaded from elsewhere
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8"))
        assert not loaded, page
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), page  # the theme would load a program for it


@pytest.mark.slow
def test_no_page_is_wider_than_a_phone_or_a_screen(site: Path) -> None:
    """A real browser shows every page in a frame of each width, and says how wide it is and what it could not draw."""
    if (program := browser.find()) is None:
        assert all("width=device-width" in page.read_text(encoding="utf-8") for page in site.glob("**/index.html"))
        return
    pages = sorted(str(page.relative_to(site)) for page in site.glob("**/index.html"))
    assert len(pages) > 20
    frames = "".join(
        f'<iframe src="{page}" width="{width}" height="800" title="{page} {width}"></iframe>'
        for page in pages
        for width in (390, 1280)
    )
    script = (
        "onload = () => { document.title = JSON.stringify([...document.querySelectorAll('iframe')].map(f => ["
        "f.title, f.contentDocument.documentElement.scrollWidth - f.width,"
        "[...f.contentDocument.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)])); }"
    )
    (site / "frames.html").write_text(f"{frames}<script>{script}</script>", encoding="utf-8")
    shown = browser.dom(program, site / "frames.html", site.parent / "profile")
    title = re.search("<title>(.*?)</title>", shown, re.DOTALL)
    assert title is not None, shown[:1000]
    found = json.loads(html.unescape(title[1]))
    assert len(found) == 2 * len(pages)
    assert [each for each in found if each[1] > 0 or each[2]] == []


def test_every_variable_that_qtool_reads_is_described() -> None:
    """`tests/environments/test_variables.py` holds that list complete."""
    from qtool.environments.variables import VARIABLES

    page = (ROOT / "docs" / "variables.md").read_text(encoding="utf-8")
    assert [each.name for each in VARIABLES if f"| `{each.name}` | {each.purpose} |" not in page] == []


def test_the_makefile_has_what_contributors_are_told_to_make() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    told = {word for document in ALL for word in re.findall(r"(?:`|\$ )make ([\w-]+)", document.read_text("utf-8"))}
    assert told <= targets


def test_the_documents_are_in_the_source_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    include = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"/docs", "/CONTRIBUTING.md"} <= {*include}
