"""The options that say how text is sampled and asked for, as vLLM names them; `generate` and `chat` share them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qtool.errors import InputError

_RECIPE = "from the model's recipe"
_MODEL = "from the recipe or generation_config.json"

MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most new tokens per answer.", show_default=_RECIPE)]
MinTokens = Annotated[int | None, typer.Option(min=0, help="No end of text before so many tokens.")]
Temperature = Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.", show_default=_RECIPE)]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Share of probability drawn from.", show_default=_MODEL)]
TopK = Annotated[int | None, typer.Option(min=-1, help="Tokens drawn from; 0 for all.", show_default=_MODEL)]
MinP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Least probability, relative to the likeliest's.", show_default=_MODEL),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: less of what is already there.", show_default=_MODEL)
]
PresencePenalty = Annotated[float | None, typer.Option(min=-2, max=2, help="For tokens that the answer has.")]
FrequencyPenalty = Annotated[float | None, typer.Option(min=-2, max=2, help="Times how often it has them.")]
Seed = Annotated[int, typer.Option(help="Prompt i draws from seed + i.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends an answer; repeat it for more.")]
System = Annotated[str | None, typer.Option(help="What the system says first; implies --chat.")]
Thinking = Annotated[
    bool | None,
    typer.Option("--enable-thinking/--no-thinking", help="For templates that can.", show_default="the template's own"),
]
ChatTemplateKwargs = Annotated[
    str | None, typer.Option(metavar="JSON", help="Further values for the chat template, as an object.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting of vLLM: of its EngineArgs or, in capitals, a variable."
    ),
]


def sampling(given: Mapping[str, Any], structured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the command line says of sampling, by vLLM's names.

    Args:
        given: all parameters of the command.
        structured: --json-schema, --regex and --choice, by vLLM's names; None is not given.

    Raises:
        InputError: a value that is none, or out of its range; more than one structure.
    """
    from qtool.recipe.schema import Sampling
    from qtool.runtimes.sampling import validated

    wanted = {name: value for name, value in (structured or {}).items() if value is not None}
    if len(wanted) > 1:
        raise InputError("an answer has one structure", where="--json-schema, --regex, --choice", hint="Give one.")
    named = {name: given[name] for name in Sampling.model_fields if given.get(name) not in (None, [], ())}
    return validated(named | ({"structured_outputs": wanted} if wanted else {}), option=True)


def biases(pairs: Sequence[str]) -> dict[int, float]:
    """`ID=BIAS` of --logit-bias as a mapping."""
    result = {}
    for pair in pairs:
        token, _, bias = pair.partition("=")
        try:
            result[int(token)] = float(bias)
        except ValueError:
            hint = "Like --logit-bias 42=-100."
            raise InputError(f"{pair!r} is no ID=BIAS", where="--logit-bias", hint=hint) from None
    return result


def template_kwargs(thinking: bool | None, further: str | None) -> dict[str, Any]:
    """What the chat template gets. Qwen calls the switch `enable_thinking`, DeepSeek and Granite `thinking`."""
    kwargs = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    if further is None:
        return kwargs
    try:
        values = json.loads(further)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError("must be a JSON object", where="--chat-template-kwargs", hint="""Like '{"date": "today"}'.""")
    return kwargs | values


def json_schema(file: str | None) -> Any:
    """What is in a --json-schema file."""
    if file is None:
        return None
    from qtool.files import read_json

    return read_json(Path(file).expanduser())
