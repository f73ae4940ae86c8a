"""A model card for what `qtool quantize` made, from its qtool.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from qtool.checkpoint import formats
from qtool.runtimes import read_by
from qtool.runtimes.table import Way
from qtool.scheme import QuantizationArgs, Scheme

_LICENSE_KEYS = ("license", "license_name", "license_link", "language")


def card(
    repo: str,
    report: Mapping[str, Any],
    base_readme: str,
    schemes: Iterable[Scheme] = (),
    *,
    ways: Sequence[Way] = (),
    license: str | None = None,
) -> str:
    """README.md as Markdown, with the front matter that hubs read.

    Args:
        repo: where the model will be, ORG/NAME or NAME.
        report: qtool.json.
        base_readme: the original's README.md, of which the licence and the language are taken; may be empty.
        schemes: of its quantized layers.
        ways: what each runtime that knows its format makes of it, as `table.as_it_is` says.
        license: as hubs call it; None for the original's.
    """
    origin = report.get("origin") or {}
    commit = str(origin.get("commit") or "")
    base, scheme, format = origin.get("repo"), str(report.get("scheme", "unknown")), str(report.get("format", ""))
    matter: dict[str, Any] = {key: value for key, value in front_matter(base_readme).items() if key in _LICENSE_KEYS}
    if license is not None:
        matter = {"license": license} | {key: value for key, value in matter.items() if not key.startswith("license")}
    if base:
        matter |= {"base_model": base, "base_model_relation": "quantized"}
    precisions = dict(map(_precision, schemes))
    matter |= {"pipeline_tag": "text-generation", "tags": ["qtool", *precisions, *filter(None, [format])]}
    calibration = report.get("calibration") or {}
    original = base + (f" at `{commit[:12]}`" if commit else "") if base else str(report.get("source", "unknown"))
    recipe = (report.get("recipe") or {}).get("name")
    rows = [
        ("base model", original),
        ("scheme", ", ".join(filter(None, [_described(scheme, precisions.values()), recipe and f"recipe `{recipe}`"]))),
        ("format", f"`{format}`" + (f", for {read_by(format)}" if format in formats.NAMES and not ways else "")),
        *_activations(report.get("activations")),
        *_cache(report.get("recipe")),
        *_runtimes(ways),
        ("calibration", _calibration(calibration)),
    ]
    if isinstance(error := report.get("mean_relative_error"), int | float):
        rows.append(("measured", f"mean relative error of the quantized layers on the calibration text: {error:.2e}"))
    if isinstance(evaluation := report.get("evaluation"), Mapping):
        rows += _evaluation(evaluation)
    rows.append(("made with", f"qtool {report.get('qtool', '')}".strip()))
    name = repo.rpartition("/")[2]
    source = str(base or report.get("source") or "").rstrip("/").rpartition("/")[2]
    title = f"{source}, {'; '.join(precisions.values())}" if source and precisions else name
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    use = _usage(repo, format, ways) if format in formats.NAMES else ""
    facts = f"| | |\n| --- | --- |\n{table}"
    return f"---\n{front}---\n\n# {_cell(title)}\n\n{use}{facts}\n\n`qtool.json` has all the settings.\n"


def _activations(chosen: Any) -> Iterator[tuple[str, str]]:
    """Which are static, where calibration decided that."""
    if isinstance(chosen, str):
        yield "activations", chosen


def _cache(recipe: Any) -> Iterator[tuple[str, str]]:
    kept = recipe.get("kv_cache") if isinstance(recipe, Mapping) else None
    if isinstance(kept, str):
        yield "keys and values", f"kept as `{kept}`"


def _runtimes(ways: Iterable[Way]) -> Iterator[tuple[str, str]]:
    """Who runs it, and who doesn't."""
    answers = {"yes": "runs in", "with a setting": "runs with a setting in", "no": "does not run in"}
    for answer, words in answers.items():
        found = [
            f"{way.runtime} {way.version}" + (f" ({way.why})" if way.why else "")
            for way in ways
            if way.answer == answer
        ]
        if found:
            yield words, ", ".join(found)


def _usage(repo: str, format: str, ways: Sequence[Way]) -> str:
    """How to run it, for the front page: the commands that need nothing but the repository's name."""
    if ways and all(way.answer == "no" for way in ways):
        return ""
    lines = [f'qtool generate {repo} --prompt "I am"']
    if format == "compressed-tensors" and not any((way.runtime, way.answer) == ("vLLM", "no") for way in ways):
        lines.append(f"vllm serve {repo}")
    return "```bash\n" + "\n".join(lines) + "\n```\n\n"


def _described(scheme: str, precisions: Iterable[str]) -> str:
    """`w8a8`: 8-bit integer weights and activations"""
    return ": ".join(filter(None, [f"`{scheme}`", "; ".join(precisions)]))


def _precision(scheme: Scheme) -> tuple[str, str]:
    """("w8a8", "8-bit integer weights and activations") and such."""
    weights, inputs = scheme.weights, scheme.activations
    tag = scheme.bits.lower()
    if inputs is None:
        return tag, f"{_numbers(weights)} weights{_zero_points(weights)}"
    words = "weights and" if _numbers(weights) == _numbers(inputs) else f"weights, {_numbers(inputs)}"
    return tag, f"{_numbers(weights)} {words} activations"


def _numbers(args: QuantizationArgs) -> str:
    return f"{args.num_bits}-bit {'integer' if args.type == 'int' else 'floating-point'}"


def _zero_points(args: QuantizationArgs) -> str:
    return "" if args.symmetric else ", with zero points"


def _evaluation(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `qtool eval` measured, each figure with its 95 % interval."""
    names = {
        "quantized_perplexity": ("perplexity", ".2f"),
        "base_perplexity": ("perplexity of the base model", ".2f"),
        "kl_divergence": ("KL divergence from the base model, nats per token", ".4f"),
        "top1_agreement": ("same likeliest token as the base model", ".1%"),
    }
    rows = []
    for key, (name, form) in names.items():
        figure = found.get(key)
        if isinstance(figure, Mapping) and isinstance(value := figure.get("value"), int | float):
            low, high = figure.get("low"), figure.get("high")
            known = isinstance(low, int | float) and isinstance(high, int | float)
            rows.append((name, f"{value:{form}}" + (f" ({low:{form}} to {high:{form}})" if known else "")))
    text = found.get("text")
    if rows and isinstance(text, Mapping):
        runtime = found.get("runtime")
        by = runtime.get("name") if isinstance(runtime, Mapping) else None
        where = f", in {by}" if by not in (None, "qtool") else ""
        what = f"{text.get('windows')} x {text.get('length')} tokens of {text.get('source')}{where}"
        rows.append(("evaluated on", what))
    return rows


def front_matter(readme: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; empty when there is none, or none that can be read."""
    if not readme.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(readme[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _calibration(calibration: Mapping[str, Any]) -> str:
    if not calibration:
        return "none"
    return f"{calibration.get('samples')} x {calibration.get('seq_len')} tokens of {calibration.get('source')}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
