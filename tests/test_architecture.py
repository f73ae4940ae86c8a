"""How the package's modules may import each other: in one direction, whether at the top of a file or in a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.launcher import WORKERS

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / "qtool").rglob("*.py"))
}

# From the top down: a module may import what lies below its line, and of its own line what has its own name here.
# It belongs to the longest name that fits.
LAYERS = (
    ("qtool.__main__",),
    ("qtool.cli", "qtool.api"),
    ("qtool.printed",),
    ("qtool.tuning",),
    ("qtool.jobs",),
    ("qtool.evaluation", "qtool.conversion"),
    ("qtool.engines",),
    ("qtool.hub",),
    ("qtool.runtimes", "qtool.model"),
    ("qtool.quant", "qtool.calibration", "qtool.environments"),
    ("qtool.recipe", "qtool.gguf"),
    ("qtool.checkpoint",),
    ("qtool.patterns",),
    ("qtool.quant.types",),  # what quantization hands to formats
    ("qtool.scheme", "qtool.workers", "qtool.console", "qtool.configuration"),
    ("qtool.files", "qtool.memory", "qtool.resources", "qtool.transfers"),
    ("qtool.locks", "qtool.sizes"),
    ("qtool.errors", "qtool.version"),
)

# (module, what it imports although that lies above it): why
EXCEPTIONS: dict[tuple[str, str], str] = {}


def imports(name: str) -> Iterator[str]:
    """The package's modules that one imports anywhere, but for type checkers only."""

    def visit(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from visit(other)
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    for node in visit(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{name} has a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [each if each in FILES else str(node.module) for each in inner]
        assert name == "qtool" or "qtool" not in found, f"{name} imports the whole package, which is above it"
        yield from (each for each in found if each in FILES and each != name)


GRAPH = {name: sorted(set(imports(name))) for name in FILES}


def cycle() -> list[str] | None:
    """Some modules that import each other in a circle."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in GRAPH[name]:
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return None

    return next(filter(None, (search(name, []) for name in GRAPH)), None)


def place(name: str) -> tuple[int, str]:
    """The index of a module's line in LAYERS, and its name there."""
    fitting = [
        (len(prefix), i, prefix)
        for i, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    assert fitting, f"{name} has no place in LAYERS: give it one"
    _, line, prefix = max(fitting)
    return line, prefix


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert cycle() is None


def test_imports_point_down() -> None:
    wrong = {
        (name, other)
        for name, others in GRAPH.items()
        if name != "qtool"
        for other in others
        if place(other) != place(name) and place(other)[0] <= place(name)[0]
    }
    assert wrong == set(EXCEPTIONS)


def test_lower_layers_are_light() -> None:
    """Nothing heavy is imported at the top of what the command line needs to check its arguments."""
    heavy = {"torch", "transformers", "numpy", "pydantic", "safetensors"}
    for name, file in FILES.items():
        if name.startswith(("qtool.checkpoint", "qtool.scheme", "qtool.cli")):
            top = [node for node in ast.parse(file.read_text(encoding="utf-8")).body]
            found = {
                alias.name.partition(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names
            }
            found |= {str(node.module).partition(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
            assert not found & heavy, name


def test_what_the_tests_launcher_forks_exists() -> None:
    assert set(FILES) >= WORKERS
