"""Options that a command gets as one argument, and sampling's, which are made of the recipe's fields."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from qtool.cli import chat, generate, sampling
from qtool.cli.bundle import expanded
from qtool.errors import InputError
from qtool.recipe.schema import Sampling


@dataclass(frozen=True)
class Pair:
    first: Annotated[int, typer.Option(help="The first.")] = 1
    second: Annotated[list[str] | None, typer.Option("--second", "-s")] = None


got: list[Any] = []


@expanded
def command(
    name: Annotated[str, typer.Argument()], pair: Pair, flag: Annotated[bool, typer.Option("--flag")] = False
) -> None:
    """What it does."""
    got.append((name, pair, flag))


def run(*args: str) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command)
    return CliRunner().invoke(app, args)


def test_each_field_is_an_option_where_the_argument_stands() -> None:
    assert list(inspect.signature(command).parameters) == ["name", "first", "second", "flag"]
    assert command.__doc__ == "What it does."
    got.clear()
    assert run("x").exit_code == 0
    assert run("x", "--first", "3", "-s", "a", "-s", "b", "--flag").exit_code == 0
    assert got == [("x", Pair(), False), ("x", Pair(3, ["a", "b"]), True)]
    assert "The first.  [default: 1]" in run("--help").output


def options(command: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(command).parameters)


def test_every_field_of_sampling_has_an_option() -> None:
    """But for what is said in other words: a structure, and what only a batch file can ask for."""
    names = options(generate.generate).keys()
    assert Sampling.model_fields.keys() - names == {"structured_outputs", "spaces_between_special_tokens"}
    assert {"json_schema", "regex", "choice"} <= names
    assert {"seed", "max_tokens"} <= options(chat.chat).keys()


def test_ranges_are_the_recipes() -> None:
    found = options(generate.generate)
    bounds = {"max_tokens": (1, None), "temperature": (0, 2), "top_k": (-1, None), "logprobs": (0, None)}
    for name, (least, most) in bounds.items():
        (option,) = get_args(found[name].annotation)[1:]
        assert (option.min, option.max) == (least, most)
    assert found["seed"].default == 0
    assert found["stop"].annotation.__origin__ == list[str] | None


def test_what_is_asked_is_validated() -> None:
    make = sampling.ALL.make
    given = {"max_tokens": 3, "stop": [], "seed": 0, "ignore_eos": False, "logit_bias": ["42=-1"], "regex": "a"}
    expected = {"max_tokens": 3, "seed": 0, "ignore_eos": False, "logit_bias": {42: -1.0}}
    assert make(given) == expected | {"structured_outputs": {"regex": "a"}}
    with pytest.raises(InputError, match="one structure"):
        make({"regex": "a", "choice": ["b"]})
    with pytest.raises(InputError, match="not ID=BIAS"):
        make({"logit_bias": ["x"]})
    with pytest.raises(InputError, match=r"^--top-p must be greater than 0"):
        make({"top_p": 0.0})
