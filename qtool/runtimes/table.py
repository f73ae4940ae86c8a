"""Who reads what, as rows from the runtimes' descriptions: for the families of the recipes, and for one model."""

from __future__ import annotations

import functools
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qtool.runtimes import facts
from qtool.runtimes.description import Checked, Quantized, Runtime
from qtool.runtimes.readings import READINGS, Reading
from qtool.scheme import W8A8, W8A8_ASYMMETRIC, W8A8_DYNAMIC, Scheme

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.recipe.policy import Policy

Answer = Literal["yes", "with a setting", "no", "unknown"]


@dataclass(frozen=True)
class Family:
    """Models of one architecture, as config.json has it; `experts` says whether they have routed experts."""

    architecture: str
    model_type: str
    experts: bool = False

    @property
    def schemes(self) -> list[str]:
        """Those of SCHEMES that its recipe has."""
        return _offered(self.architecture, self.model_type)

    def quantized(self, scheme: str, format: str, dtype: str) -> Quantized:
        """One of its models, by one of SCHEMES."""
        attention, others = SCHEMES[scheme]
        if (scheme, format) == ("w8a8", "compressed-tensors") and not self.experts:
            others = W8A8_ASYMMETRIC  # symmetric: auto
        linears: dict[str, Scheme | None] = {"model.layers.0.self_attn.q_proj": attention}
        if not self.experts:
            linears["model.layers.0.mlp.up_proj"] = others
        else:  # recipes leave experts float rather than static
            linears["model.layers.0.mlp.experts.0.up_proj"] = None if others == W8A8 else others
        return Quantized({"architectures": [self.architecture], "model_type": self.model_type}, linears, dtype)


FAMILIES = (
    Family("DeepseekV3ForCausalLM", "deepseek_v3", experts=True),
    Family("Glm4MoeForCausalLM", "glm4_moe", experts=True),
    Family("Glm4vForConditionalGeneration", "glm4v"),
    Family("LlamaForCausalLM", "llama"),
    Family("MistralForCausalLM", "mistral"),
    Family("MixtralForCausalLM", "mixtral", experts=True),
    Family("Qwen2ForCausalLM", "qwen2"),
    Family("Qwen3ForCausalLM", "qwen3"),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", experts=True),
    Family("TeleChat2ForCausalLM", "telechat"),
)
# The recipes' schemes: how the linears of attention are quantized, and how the others are.
SCHEMES: dict[str, tuple[Scheme, Scheme]] = {
    "w8a8": (W8A8, W8A8_DYNAMIC),
    "w8a8-dynamic": (W8A8_DYNAMIC, W8A8_DYNAMIC),
    "w8a8-static": (W8A8, W8A8),
}
# What starts a runtime that qtool doesn't, before the path.
_ELSEWHERE = {"sglang": "python -m sglang.launch_server --model-path"}
DTYPES = {"BF16": "", "F32": " in float32"}


@dataclass(frozen=True)
class Row:
    """Whether a runtime reads some models in one format.

    Attributes:
        runtime: its title.
        version: that this is known of.
        format: as `--format` has it; "float" is a model that is not quantized.
        models: their architectures.
        schemes: of the recipes.
        answer: yes; with a setting, which qtool makes where it starts the runtime; no; or unknown, though the runtime
            reads the format.
        why: which setting, or why not; empty for yes and unknown.
        source: package and files that say so; empty where nobody looked.
        checked: run, where the tests have the runtime's own code read such a checkpoint; read in its source; or not.
    """

    runtime: str
    version: str
    format: str
    models: tuple[str, ...]
    schemes: tuple[str, ...]
    answer: Answer
    why: str
    source: str
    checked: Checked

    @property
    def cells(self) -> tuple[str, ...]:
        """Its columns, as the page and the command show them."""
        return (
            f"{self.runtime} {self.version}",
            self.format,
            ", ".join(self.models),
            ", ".join(self.schemes),
            self.answer,
            self.why,
            self.source,
            self.checked,
        )


COLUMNS = ("runtime", "format", "models", "scheme", "reads it", "why, or how", "source", "checked")


@dataclass(frozen=True)
class Way:
    """Whether, and how, one model can be served.

    Attributes:
        runtime, version, format, answer, why, source, checked: as of a `Row`.
        scheme: of the recipe; empty for the model as it is.
        how: the commands that lead to it; empty for no.
    """

    runtime: str
    version: str
    format: str
    scheme: str
    answer: Answer
    why: str
    how: str
    source: str
    checked: Checked


def rows() -> list[Row]:
    """For all families, schemes and formats; those that have the same answer for the same reason are one row."""
    found = []
    for runtime in facts.KNOWN:
        for reads in runtime.reads:
            if reads.format != "float":
                found += _rows(runtime, reads.format)
    return found


def ways(checkpoint: Checkpoint) -> list[Way]:
    """For one model: as it is, and in each scheme and format that qtool could give it.

    Raises:
        InputError: a config.json or a description that makes no sense.
    """
    from qtool.checkpoint import formats

    format, model = formats.of(checkpoint), _model(checkpoint)
    path = _shown(checkpoint.path)
    result = [_way(runtime, format.name, "", model, path) for runtime in _knowing(format.name)]
    if not format.is_float:
        targets = [name for name in formats.NAMES if name != format.name] if any(model.schemes.values()) else []
        return result + [
            way for name in targets for way in _each(name, "", model, f"qtool convert {path} --to {name} | ")
        ]
    for scheme, policies in _planned(checkpoint).items():
        for name in formats.NAMES:
            settled = {layer: each and each.settled(formats.get(name).expresses) for layer, each in policies.items()}
            planned = {layer: None if each is None else each.scheme for layer, each in settled.items()}
            wanted = Quantized(checkpoint.config, planned, model.dtype)
            command = f"qtool quantize {path} --scheme {scheme} --format {name} | "
            result += _each(name, scheme, wanted, command)
    return result


def as_it_is(checkpoint: Checkpoint) -> list[Way]:
    """For one model as it is: what each runtime that knows its format makes of it.

    Raises:
        InputError: a config.json or a description that makes no sense.
    """
    from qtool.checkpoint import formats

    format = formats.of(checkpoint)
    model, path = _model(checkpoint), _shown(checkpoint.path)
    return [_way(runtime, format.name, "", model, path) for runtime in _knowing(format.name)]


def _model(checkpoint: Checkpoint) -> Quantized:
    from qtool.checkpoint.summary import float_dtype, kept_cache, schemes

    found = schemes(checkpoint)
    quantized = {name for name, scheme in found.items() if scheme is not None}
    return Quantized(checkpoint.config, found, float_dtype(checkpoint, quantized), kept_cache(checkpoint))


def _knowing(format: str) -> list[Runtime]:
    """The readers of a format, and those that qtool doesn't start."""
    others = (runtime for runtime in facts.KNOWN if runtime.worker is None and runtime.reading(format) is not None)
    return [*facts.readers(format), *others]


def markdown() -> str:
    """The page of the documentation that shows `rows`."""
    table = rows()
    counts, each = Counter(row.checked for row in table), Counter[Checked]()
    for row in table:  # in bfloat16
        each[row.checked] += len(row.schemes) * sum(model.isidentifier() for model in row.models)
    lines = [
        "# Which runtime reads what",
        "",
        "For the families that recipes are for. `qtool runtimes` prints these rows, `qtool runtimes MODEL` what they",
        "mean for one model. `make docs` writes this page.",
        "",
        f"Of {len(table)} rows {counts['run']} were checked by the runtime's own code, which loaded them,",
        f"{counts['read']} by reading its source, and {counts['not']} not at all: *unknown*. By family and scheme,",
        f"in bfloat16, that is {each['run']}, {each['read']} and {each['not']}. *With a setting*: qtool makes it where",
        "it starts the runtime. llama.cpp reads a file that is made first, so it has no rows. SGLang and MindIE are",
        "started by others; of MindIE, which is said to read modelslim too, nothing was checked. `quantize` refuses",
        "what could only load as noise; it warns of the rest that is *no*, which `convert` refuses, and",
        "`generate` and `serve` before they start.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for row in table:
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in row.cells) + " |")
    return "\n".join([*lines, *_caches(), *_measured(), ""])


def _caches() -> Iterator[str]:
    """The part of the page about keys and values."""
    yield from (
        "",
        "## Keys and values in the cache",
        "",
        "Where a checkpoint says that keys and values are kept in 8 bits (`quantize --kv-cache`):",
        "",
        "| runtime | format | keeps them as | but |",
        "| --- | --- | --- | --- |",
    )
    for runtime in facts.KNOWN:
        for reads in runtime.reads:
            if reads.format == "float":
                continue
            cache = ", ".join(sorted(reads.caches)) or "floats alone: such a checkpoint is refused"
            model = Quantized({}, {}, "BF16", min(reads.caches, default=None))
            but = "; ".join(found.text for found in runtime.limitations(reads.format, model) if reads.caches)
            yield f"| {runtime.title} {runtime.version} | {reads.format} | {cache} | {but} |"


def _measured() -> Iterator[str]:
    """The part of the page about what was counted."""
    well = [each.counts for each in READINGS if each.well]
    parameters, tensors = sum(each.parameters for each in well), sum(each.tensors for each in well)
    yield from (
        "",
        "## What their own code made of our checkpoints",
        "",
        "A tiny bfloat16 model of each family, quantized as its recipe says, in the hands of the runtime's own",
        "loading code, on a CPU, with kernels replaced (`tests/checkpoint/readings.py`). *Parameters* are those",
        "of the runtime's model; *untouched* ones are not, or not wholly, filled from the files. *Read* are",
        "tensors of the files that the code looked into; into *unread* ones it did not, not counting scales and",
        "zero points that only repeat what others say; *mistaken* ones went into a parameter of another kind of",
        "numbers. Of vLLM-MindSpore's native models (Llama, and static Qwen2 and Qwen3) only the quantized",
        "linears were built. vLLM was its build for CPUs, 0.32.0; the code of 0.33.0, of which there is no such build,",
        "made the same of all 26 checkpoints. vllm-ascend was 0.23.0, whose code for this format 0.23.0.post1 has,",
        "on vLLM 0.32.0. On its own vLLM, 0.23.0, it made the same of all but DeepSeek-V3's, which that vLLM can't",
        "build on a CPU.",
        "",
        f"Of {len(READINGS)} combinations {len(well)} load whole: {parameters} parameters from {tensors} tensors, none",
        "untouched, unread or mistaken. The others are *no* above.",
        "",
        "| runtime | format | model | scheme | parameters | read | untouched | unread | mistaken | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    titles = {runtime.name: runtime.title for runtime in facts.KNOWN}
    for each in READINGS:
        counts = ["", "", "", "", ""] if each.error else [str(count) for count in astuple(each.counts)]
        cells = (titles[each.runtime], each.format, each.architecture, each.scheme, *counts, each.error)
        yield "| " + " | ".join(cells) + " |"


@functools.cache
def _offered(architecture: str, model_type: str) -> list[str]:
    from qtool.recipe.load import match

    recipe, _ = match({"architectures": [architecture], "model_type": model_type})
    return [scheme for scheme in SCHEMES if scheme in recipe.schemes]


def _rows(runtime: Runtime, format: str) -> list[Row]:
    grouped: dict[tuple[Answer, str, str, Checked], dict[str, list[str]]] = {}
    for family in FAMILIES:
        for scheme in family.schemes:
            usual = None
            for dtype, suffix in DTYPES.items():
                answer, why, source, checked, _ = _judge(
                    runtime, format, scheme, family.quantized(scheme, format, dtype)
                )
                key = (answer, why, source, checked)
                if key[:2] != usual:  # another dtype, another answer
                    grouped.setdefault(key, {}).setdefault(family.architecture + suffix, []).append(scheme)
                usual = usual or key[:2]
    return [
        Row(runtime.title, runtime.version, format, models, schemes, *key)
        for key, by_model in grouped.items()
        for schemes, models in _together(by_model).items()
    ]


def _together(by_model: Mapping[str, list[str]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Models by their schemes."""
    together: dict[tuple[str, ...], tuple[str, ...]] = {}
    for model, schemes in by_model.items():
        together[tuple(schemes)] = (*together.get(tuple(schemes), ()), model)
    return together


def _judge(
    runtime: Runtime, format: str, scheme: str, model: Quantized
) -> tuple[Answer, str, str, Checked, tuple[str, ...]]:
    """Answer, why, source, how it was checked, and the sentences about this model."""
    limits = runtime.limits(format, model)
    refused = [found for found in limits if found[1].refuses]
    counting = refused or limits
    reads, read = runtime.reading(format), _reading(runtime, format, scheme, model)
    by_running: Checked = "run" if read and model.dtype != "F32" else "read"  # those that were run are bfloat16
    if counting:
        why, source = (
            "; ".join(dict.fromkeys(getattr(limit, key) for limit, _ in counting)) for key in ("why", "source")
        )
        said = tuple(limitation.text for _, limitation in counting)
        return "no" if refused else "with a setting", why, source, by_running, said
    if read or (reads is not None and model.architecture in reads.studied):
        return "yes", "", reads.source if reads else "", by_running, ()
    return "unknown", "", "", "not", ()


def _reading(runtime: Runtime, format: str, scheme: str, model: Quantized) -> Reading | None:
    """What the runtime's own code made of such a model, if it was run."""
    of = (runtime.name, format, model.architecture, scheme)
    return next((each for each in READINGS if (each.runtime, each.format, each.architecture, each.scheme) == of), None)


def _each(format: str, scheme: str, model: Quantized, command: str) -> Iterable[Way]:
    from qtool.checkpoint import formats

    problems = formats.get(format).problems(model.schemes)
    for runtime in _knowing(format):
        way = _way(runtime, format, scheme, model, "-", command)
        if problems:
            way = Way(runtime.title, runtime.version, format, scheme, "no", problems[0].text, "", "", "read")
        yield way


def _way(runtime: Runtime, format: str, scheme: str, model: Quantized, path: str, command: str = "") -> Way:
    answer, _, source, checked, said = _judge(runtime, format, scheme or _alike(model), model)
    how = f"{command}qtool {'serve' if runtime.server else 'generate'} {path} --runtime {runtime.name}"
    if runtime.worker is None:
        how = f"{command}xargs {_ELSEWHERE[runtime.name]}" if command else f"{_ELSEWHERE[runtime.name]} {path}"
    return Way(
        runtime.title,
        runtime.version,
        format,
        scheme,
        answer,
        "; ".join(said),
        "" if answer == "no" else how,
        source,
        checked,
    )


def _alike(model: Quantized) -> str:
    """Which of SCHEMES a model's layers have; empty for none."""
    found = {scheme for scheme in model.schemes.values() if scheme is not None}
    if found == {W8A8, W8A8_ASYMMETRIC}:
        return "w8a8"
    return next((name for name, schemes in SCHEMES.items() if found == set(schemes)), "")


def _planned(checkpoint: Checkpoint) -> dict[str, dict[str, Policy | None]]:
    """How each scheme of the recipe that fits a float model would quantize its linears."""
    from qtool.checkpoint import formats
    from qtool.recipe.load import match

    recipe, _ = match(checkpoint.config)
    linears = [name for name in formats.of(checkpoint).layers(checkpoint) if any(map(str.isdigit, name.split(".")))]
    return {scheme: {name: recipe.policy(scheme, name) for name in linears} for scheme in recipe.schemes}


def _shown(path: Path) -> str:
    return shlex.quote(str(path))
