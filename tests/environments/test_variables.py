"""The list of variables against the source: nothing is read that isn't in it, and nothing is in it that isn't read."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qtool.environments.machine import CANN_VARIABLES
from qtool.environments.settings import variable
from qtool.environments.table import ENGINES
from qtool.environments.variables import VARIABLES
from qtool.hub.access import TOKEN_VARIABLES
from qtool.runtimes.server import KEY_VARIABLE

SOURCE = Path(__file__).resolve().parents[2] / "qtool"

# Where a variable's name is computed: what it can be. Defaults that the user's own value replaces are no reading.
COMPUTED = {
    "hub/tokens.py": set(TOKEN_VARIABLES.values()),
    "environments/settings.py": {variable(engine) for engine in ENGINES},
    "environments/machine.py": set(CANN_VARIABLES),
    "runtimes/launch.py": {variable(engine) for engine in ENGINES},
    "runtimes/vllm_mindspore.py": {"VLLM_MS_MODEL_BACKEND"},
    "cli/defaults.py": {"QTOOL_COMMAND_OPTION"},  # any of them
    "cli/serve.py": {KEY_VARIABLE},
}
DEFAULTS = {
    "engines/native/__init__.py",
    "engines/golden_stick/mindformers.py",
    "runtimes/settings.py",
}


def reads(tree: ast.AST) -> Iterator[ast.expr]:
    """What names the variable, wherever os.environ or os.getenv is asked for one."""

    def is_environ(node: ast.expr) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "environ"

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            environ = is_environ(node.func.value) and node.func.attr in ("get", "pop")
            if environ or node.func.attr == "getenv":
                yield node.args[0]
        elif isinstance(node, ast.Subscript) and is_environ(node.value) and isinstance(node.ctx, ast.Load):
            yield node.slice
        elif isinstance(node, ast.Compare) and any(is_environ(each) for each in node.comparators):
            yield node.left


def found() -> tuple[set[str], set[str]]:
    """The names that the source reads, and the files in which names are computed."""
    names: set[str] = set()
    computed: set[str] = set()
    for file in SOURCE.rglob("*.py"):
        for name in reads(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(name, ast.Constant):
                names.add(str(name.value))
            else:
                computed.add(file.relative_to(SOURCE).as_posix())
    return names, computed


def test_all_that_is_read_is_listed_and_the_other_way_round() -> None:
    names, computed = found()
    assert len(names) > 5
    assert computed == COMPUTED.keys() | DEFAULTS
    assert {each.name for each in VARIABLES if each.read_by == "qtool"} == names.union(*COMPUTED.values())
    assert len({each.name for each in VARIABLES}) == len(VARIABLES)
    assert all(each.purpose.endswith(".") for each in VARIABLES)


def test_they_are_printed(run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("env", "vars")
    assert done.code == 0, done.stderr
    assert all(each.name in done.stdout for each in VARIABLES)
    listed = json.loads(run_qtool("env", "vars", "--json").stdout)
    assert [row["name"] for row in listed] == [each.name for each in VARIABLES]
