"""The options that say how text is sampled, as vLLM names them: made of the fields of `recipe.schema.Sampling`.

`generate` has all of them, `chat` some. A field's description is the option's help, its range the option's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args

import typer

from qtool.cli.bundle import Bundle, option
from qtool.cli.helptexts import in_panel
from qtool.errors import InputError
from qtool.files import expand
from qtool.recipe.schema import Sampling

_RECIPE = "the recipe's"
_MODEL = "the model's"
_REPEAT = "Can be repeated."

# What an option says otherwise than its field: that is about a list where the option gives one of it, for example.
_OTHERWISE: dict[str, dict[str, Any]] = {
    "max_tokens": {"show_default": _RECIPE},
    "temperature": {"show_default": _RECIPE},
    "top_p": {"show_default": _MODEL},
    "top_k": {"show_default": _MODEL},
    "min_p": {"show_default": _MODEL},
    "repetition_penalty": {"show_default": _MODEL, "min": None},
    "seed": {"help": "The random seed. Prompt i uses seed + i."},
    "stop": {"help": f"A text that ends the answer. {_REPEAT}"},
    "stop_token_ids": {"help": f"A token that ends the answer. {_REPEAT}", "metavar": "ID"},
    "bad_words": {"help": f"A word that must not be in the answer. {_REPEAT}"},
    "logit_bias": {"help": f"Add BIAS to the logit of token ID. {_REPEAT}", "metavar": "ID=BIAS"},
    "allowed_token_ids": {"help": f"A token that the answer may have; no others may. {_REPEAT}", "metavar": "ID"},
    "skip_special_tokens": {"show_default": "skip"},
}
_PANEL = "Sampling"
_DEFAULTS = {"seed": 0}
_FLAGS = {"skip_special_tokens": "--skip-special-tokens/--no-skip-special-tokens"}
_STRUCTURES = (
    option(
        "json_schema",
        Annotated[
            str | None, typer.Option(metavar="FILE", help="A file with the JSON schema that answers must follow.")
        ],
        None,
    ),
    option(
        "regex",
        Annotated[str | None, typer.Option(metavar="REGEX", help="A regular expression that answers must match.")],
        None,
    ),
    option(
        "choice",
        Annotated[list[str] | None, typer.Option(help="One of the answers to choose from. Give it once for each.")],
        None,
    ),
)
_NO_OPTION = {"spaces_between_special_tokens", "structured_outputs"}


def bundle(*names: str, **otherwise: dict[str, Any]) -> Bundle:
    """The options for these fields of Sampling; a command gets what has been given of them, validated.

    Args:
        names: none are all, and then how answers are structured as well.
        otherwise: by a field's name, what its option says here otherwise than elsewhere.
    """
    wanted = names or [name for name in Sampling.model_fields if name not in _NO_OPTION]
    options = [_option(name, otherwise.get(name, {})) for name in wanted]
    chosen = options if names else [*options, *_STRUCTURES]
    return Bundle([each.replace(annotation=in_panel(each.annotation, _PANEL)) for each in chosen], _asked)


def _option(name: str, otherwise: Mapping[str, Any]) -> Any:
    field = Sampling.model_fields[name]
    kind = _kind(field.annotation)
    said: dict[str, Any] = {}
    if field.description:
        said["help"] = f"{field.description[:1].upper()}{field.description[1:]}."
    if kind in (int, float):
        said |= _range(field.metadata, kind)
    said |= {**_OTHERWISE.get(name, {}), **otherwise}
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    default = _DEFAULTS.get(name)
    kind = kind if default is not None else kind | None
    return option(name, Annotated[kind, typer.Option(flag, **said)], default)


def _kind(annotation: Any) -> Any:
    """A type that a command line can say: without None and pydantic's marks, lists of texts for what is no list."""
    (kind,) = [each for each in get_args(annotation) if each is not type(None)]
    bare = getattr(kind, "__origin__", kind)
    if bare is list:
        (item,) = get_args(kind)
        return list[getattr(item, "__origin__", item)]  # type: ignore[misc]
    return list[str] if bare is dict else bare


def _range(metadata: Sequence[Any], kind: Callable[[int], Any]) -> dict[str, Any]:
    """Typer's ranges include their ends: above 0 is from 1 for integers, and from 0 for what validation sees again."""
    found: dict[str, Any] = {}
    for mark in metadata:
        if (least := getattr(mark, "ge", None)) is not None:
            found["min"] = least
        elif (above := getattr(mark, "gt", None)) is not None:
            found["min"] = above + 1 if kind is int else above
        elif (most := getattr(mark, "le", None)) is not None:
            found["max"] = most
    return found


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says of sampling, by vLLM's names; None and nothing are not given.

    Raises:
        InputError: a value that is none, or out of its range; more than one structure.
    """
    from qtool.runtimes.sampling import validated

    named = {name: given.get(name) for name in Sampling.model_fields}
    named["logit_bias"] = _biases(given.get("logit_bias") or ())
    structures = {"json": _json_schema(given.get("json_schema")), "regex": given.get("regex")}
    structures["choice"] = given.get("choice") or None
    structures = {name: value for name, value in structures.items() if value is not None}
    if len(structures) > 1:
        raise InputError(
            "an answer can have only one structure", where="--json-schema, --regex, --choice", hint="Give one."
        )
    named["structured_outputs"] = structures
    return validated({name: value for name, value in named.items() if value not in (None, [], (), {})}, option=True)


def _biases(pairs: Sequence[str]) -> dict[int, float]:
    """`ID=BIAS` of --logit-bias as a mapping."""
    result = {}
    for pair in pairs:
        token, _, bias = pair.partition("=")
        try:
            result[int(token)] = float(bias)
        except ValueError:
            hint = "Like --logit-bias 42=-100."
            raise InputError(f"{pair!r} is not ID=BIAS", where="--logit-bias", hint=hint) from None
    return result


def _json_schema(file: str | None) -> Any:
    """What is in a --json-schema file."""
    if file is None:
        return None
    from qtool.files import read_json

    return read_json(expand(file))


ALL = bundle()
"""Every field's option."""
