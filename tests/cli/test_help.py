"""What `--help` of every command looks like: sentences, panels, one kind of placeholder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import pytest
import typer
import typer.core
import typer.main

from qtool.cli import app, helptexts
from qtool.cli.helptexts import OPTIONS, Commands, in_panel, placeholder, sections

PLACEHOLDERS = {
    "ADDRESS", "BASE", "DIR", "FILE", "GLOB", "ID", "ID=BIAS", "JSON", "KEY=VALUE", "MODEL", "N", "NAME", "ORG/NAME",
    "PATH", "QUANTIZED", "RECIPE", "REGEX", "SIZE", "TEXT", "URL", "X",
}  # fmt: skip
MANY = 15  # options that need panels


def commands() -> Iterator[tuple[str, Any]]:
    for name in app.COMMANDS:
        command: Any = app.load(name)
        below = getattr(command, "commands", None)
        if below is None:
            yield name, command
        else:
            for each, inner in below.items():
                yield f"{name} {each}", inner


ALL: dict[str, Any] = dict(commands())


def context(name: str) -> Any:
    return ALL[name].make_context(name, [], resilient_parsing=True)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_explained_in_sentences(name: str) -> None:
    command = ALL[name]
    assert type(command).format_options is helptexts.Command.format_options
    assert re.fullmatch(r"[A-Z][^\n]*\.", command.help.split("\n\n")[0].replace("\n", " ")), command.help
    for param in command.get_params(context(name)):
        assert param.help, param.name
        assert re.match(r"[A-Z0-9`]", param.help), (param.name, param.help)
        assert param.help.endswith("."), (param.name, param.help)
        assert not re.search(r"\bstdin\b|\bstdout\b| - reads|; repeat", param.help), (param.name, param.help)


@pytest.mark.parametrize("name", ALL)
def test_placeholders_are_of_one_kind(name: str) -> None:
    for param in ALL[name].get_params(context(name)):
        if getattr(param, "is_flag", False):
            continue
        parts = placeholder(param).removesuffix("...").removesuffix(",").split("|")
        for part in parts:
            bare = part.removeprefix("@")
            literal = len(parts) > 1 and re.fullmatch(r"[a-z0-9-]+", bare)
            assert literal or bare in PLACEHOLDERS, (param.name, part)


@pytest.mark.parametrize("name", [name for name in ALL if len(ALL[name].params) > MANY])
def test_many_options_are_in_panels(name: str) -> None:
    found = sections(ALL[name], context(name))
    assert len(found) > 3
    assert len(found.get(OPTIONS, [])) <= 3


@pytest.mark.parametrize("name", ALL)
def test_the_page_shows_no_types_and_no_ranges(run_qtool: Any, name: str) -> None:
    shown = run_qtool(*name.split(), "--help").stdout
    assert not re.search(r"<\w|\[x|x[<>]=|\{[A-Za-z]", re.sub(r"qtool .*|\.\[\].*|'.*'", "", shown)), shown
    assert max(map(len, shown.splitlines())) <= 80
    usage = shown.partition("\n\n")[0]
    for param in ALL[name].params:
        if param.param_type_name == "argument":
            assert placeholder(param) in usage


def test_defaults_names_and_panels_are_printed() -> None:
    single = Commands(add_completion=False, rich_markup_mode=None)

    @single.command("work")
    def work(
        model: Annotated[str, typer.Argument(metavar="MODEL", help="A model.")],
        kind: Annotated[Literal["a", "b"], typer.Option(help="One.", rich_help_panel="Kinds")] = "a",
        sizes: Annotated[list[int] | None, typer.Option("--size", "-s", min=1, help="A size.")] = None,
        share: Annotated[float | None, typer.Option(help="A share.", show_default="all of it")] = None,
        fast: Annotated[bool | None, typer.Option("--fast/--slow", help="How fast.")] = None,
    ) -> None: ...

    command = typer.main.get_command(single)
    shown = re.sub(r" {2,}", "  ", command.get_help(command.make_context("work", [], resilient_parsing=True)))
    assert "Usage: work [OPTIONS] MODEL\n" in shown
    assert "Kinds:\n  --kind a|b  One. (default: a)\n" in shown
    assert "  -s, --size N  A size.\n" in shown
    assert "  --share X  A share. (default: all of it)\n" in shown
    assert "  --fast / --slow  How fast.\n" in shown
    assert shown.index("Arguments:") < shown.index("Kinds:") < shown.index("Options:")
    assert isinstance(command, typer.core.TyperCommand)


def test_an_option_keeps_its_own_panel_and_a_shared_one_is_not_changed() -> None:
    free = Annotated[int, typer.Option(help="One.")]
    own = Annotated[int, typer.Option(help="One.", rich_help_panel="Own")]
    assert get_args(in_panel(free, "Title"))[1].rich_help_panel == "Title"
    assert get_args(free)[1].rich_help_panel is None
    assert in_panel(own, "Title") == own
    assert in_panel(int, "Title") is int
