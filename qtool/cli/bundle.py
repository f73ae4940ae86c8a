"""Options that belong together, as one argument of a command.

A command that is `expanded` may have an argument whose type is a frozen dataclass of options: on the command line each
field is an option of its own, where the argument stands; the command gets the dataclass. `Bundle` does the same for
options that are made rather than written down. The dataclass's `panel` is the title over its options in `--help`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from qtool.cli.helptexts import OPTIONS, in_panel


@dataclass(frozen=True)
class Bundle:
    """Marks an argument, in its `Annotated`, as made of several options.

    Attributes:
        options: their names, types as Typer wants them, and defaults.
        make: what the command gets, from their values by name.
    """

    options: Sequence[inspect.Parameter]
    make: Callable[[Mapping[str, Any]], Any]


def option(name: str, kind: Any, default: Any) -> inspect.Parameter:
    """An option of a bundle; `kind` is a type, annotated with a typer.Option."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every bundle's options in place of the bundle."""
    hints = get_type_hints(command, include_extras=True)
    options: list[inspect.Parameter] = []
    bundles: dict[str, Bundle] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if (bundle := _bundle(hints[name])) is None:
            options.append(option(name, hints[name], parameter.default))
        else:
            bundles[name] = bundle
            options += bundle.options

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {}
        for name, bundle in bundles.items():
            made[name] = bundle.make({option.name: given.pop(option.name) for option in bundle.options})
        command(**given, **made)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _bundle(kind: Any) -> Bundle | None:
    if get_origin(kind) is Annotated:
        return next((marker for marker in get_args(kind) if isinstance(marker, Bundle)), None)
    if not dataclasses.is_dataclass(kind):
        return None
    made: Any = kind
    hints = get_type_hints(kind, include_extras=True)
    title = getattr(kind, "panel", OPTIONS)
    options = [
        option(field.name, in_panel(hints[field.name], title), field.default) for field in dataclasses.fields(kind)
    ]
    return Bundle(options, lambda given: made(**given))
