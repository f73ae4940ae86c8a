"""How `--help` looks: options in panels, plain placeholders, defaults in words.

Typer without rich prints types and ranges (`<list[str]>`, `[x>=1]`) and no panels; with rich it would take a tenth of a
second longer. A command with `cls=Command` prints `--samples N  How many ... (default: 8)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer
import typer.core

OPTIONS = "Options"
MESSAGES = "Messages"  # what is printed; every command has them, last
PLACEHOLDERS: dict[str, str] = {"int": "N", "float": "X", "str": "TEXT", "path": "PATH"}


class Command(typer.core.TyperCommand):
    """A command whose help is written here."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`[OPTIONS] MODEL [DIR]`."""
        pieces = [self.options_metavar] if self.options_metavar else []
        return pieces + [_usage(param) for param in self.get_params(ctx) if param.param_type_name == "argument"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then the options panel by panel."""
        for title, params in sections(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl([(_names(param), _told(param, ctx)) for param in params])


def sections(command: Any, ctx: Any) -> dict[str, list[Any]]:
    """The parameters of a command under their titles, as they are printed: arguments first, what is printed last."""
    found: dict[str, list[Any]] = {"Arguments": []}
    for param in command.get_params(ctx):
        if not getattr(param, "hidden", False):
            found.setdefault(_title(param), []).append(param)
    if MESSAGES in found:
        found[MESSAGES] = found.pop(MESSAGES)
        rest = found.get(OPTIONS, [])
        found[MESSAGES] += [param for param in rest if param.name == "help"]
        found[OPTIONS] = [param for param in rest if param.name != "help"]
    return {title: params for title, params in found.items() if params}


class Commands(typer.Typer):
    """A Typer whose commands are `Command`s."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        return super().command(name, **{"cls": Command, **settings})


def in_panel(kind: Any, title: str) -> Any:
    """The type of an option, `Annotated[..., typer.Option(...)]`, with a panel unless it names one itself."""
    if (info := next((each for each in get_args(kind)[1:] if hasattr(each, "rich_help_panel")), None)) is None:
        return kind
    if info.rich_help_panel is not None:
        return kind
    placed = copy.copy(info)  # several commands may share the original
    placed.rich_help_panel = title
    first, *marks = get_args(kind)
    return Annotated[(first, *(placed if mark is info else mark for mark in marks))]


def _title(param: Any) -> str:
    return "Arguments" if param.param_type_name == "argument" else getattr(param, "rich_help_panel", None) or OPTIONS


def placeholder(param: Any) -> str:
    """What stands for a parameter's value: `N`, `FILE`, `auto|cpu|cuda`."""
    if param.metavar is not None:
        return str(param.metavar)
    kind = param.type_descriptor
    if kind.is_choice:
        return "|".join(map(str, kind.choices))
    if kind.is_path:
        return PLACEHOLDERS["path"]
    bare = param.bare_type().removeprefix("list[").removesuffix("]")
    return PLACEHOLDERS.get(bare, bare.upper())


def _usage(param: Any) -> str:
    name = placeholder(param)
    return name if param.required else f"[{name}]"


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return _usage(param)
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        names += f" / {', '.join(param.secondary_opts)}"
    return names if param.is_flag else f"{names} {placeholder(param)}"


def _told(param: Any, ctx: Any) -> str:
    """The help text, and the default where there is one to tell."""
    text = param.help or ""
    default = _default(param, ctx)
    return f"{text} (default: {default})" if default else text


def _default(param: Any, ctx: Any) -> str:
    if (value := (ctx.default_map or {}).get(param.name)) is not None:
        return f"{str(value).lower() if isinstance(value, bool) else value}, by your configuration"
    if isinstance(param.show_default, str):
        return param.show_default
    if param.is_flag if param.param_type_name == "option" else param.required:
        return ""
    value = param.get_default(ctx, call=False)
    return "" if value is None or not param.show_default else str(value)
