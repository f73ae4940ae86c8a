"""What a job came to: as data, and as a page of Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtool import sizes
from qtool.checkpoint.reader import Checkpoint
from qtool.jobs.recipe import Outcome
from qtool.recipe.schema import Recipe

PAGE = "summary.md"

_FIGURES = {
    "base_perplexity": ("perplexity, original", ".3f"),
    "quantized_perplexity": ("perplexity, quantized", ".3f"),
    "kl_divergence": ("KL divergence, nats per token", ".5f"),
    "top1_agreement": ("top-1 agreement", ".2%"),
}


def collect(recipe: Recipe, folder: Path, outcome: Outcome) -> dict[str, Any]:
    """Everything `qtool run --json` prints.

    Keys: recipe, scheme, work, model, checkpoints (path and bytes of the tensors, by format; "float" is the original),
    stages (name, status "done" or "kept", seconds, output), eval (the figures of `qtool eval --json`, or None) and
    answers (those of `qtool generate --json`, or None).
    """
    sizes = {"float": outcome.model, **outcome.checkpoints}
    if outcome.model in outcome.checkpoints.values():
        del sizes["float"]
    return {
        "recipe": recipe.name,
        "scheme": recipe.default_scheme,
        "work": str(folder),
        "model": str(outcome.model),
        "checkpoints": {
            name: {"path": str(path), "bytes": Checkpoint.open(path).nbytes} for name, path in sizes.items()
        },
        "stages": [
            {
                "name": stage.name,
                "status": "kept" if stage.kept else "done",
                "seconds": stage.seconds,
                "output": str(stage.output),
            }
            for stage in outcome.stages
        ],
        "eval": json.loads(outcome.evaluation.read_text(encoding="utf-8")) if outcome.evaluation else None,
        "answers": _lines(outcome.answers) if outcome.answers else None,
    }


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def stage_rows(summary: dict[str, Any]) -> list[list[str]]:
    """name, status, seconds, output"""
    return [
        [
            stage["name"],
            stage["status"],
            "" if stage["seconds"] is None else f"{stage['seconds']:.1f}",
            Path(stage["output"]).name,
        ]
        for stage in summary["stages"]
    ]


def size_rows(summary: dict[str, Any]) -> list[list[str]]:
    """format, size, of the original, folder"""
    whole = summary["checkpoints"].get("float", {}).get("bytes")
    rows = []
    for name, found in summary["checkpoints"].items():
        path, share = Path(found["path"]), f"{found['bytes'] / whole:.0%}" if whole else ""
        shown = path.relative_to(summary["work"]) if path.is_relative_to(summary["work"]) else path
        rows.append([name, sizes.show(found["bytes"]), share, str(shown)])
    return rows


def figure_rows(summary: dict[str, Any]) -> list[list[str]]:
    """figure, mean, 95 % interval"""
    rows = []
    for key, (name, form) in _FIGURES.items():
        figure = (summary["eval"] or {}).get(key)
        if figure:
            low, high = figure["low"], figure["high"]
            rows.append([name, f"{figure['value']:{form}}", "" if low is None else f"{low:{form}} to {high:{form}}"])
    return rows


def page(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    title = f"# {Path(summary['model']).name}, recipe {summary['recipe']}, scheme {summary['scheme']}"
    parts = [title, _table(["format", "size", "of the original", "folder"], size_rows(summary))]
    if rows := figure_rows(summary):
        text = summary["eval"]["text"]
        parts += [
            "## What quantization cost",
            f"{text['windows']} x {text['length']} tokens of {_plain(text['source'])}.",
            _table(["", "mean", "95 % interval"], rows),
        ]
    if summary["answers"]:
        parts += ["## What it writes", *(_quoted(answer) for answer in summary["answers"])]
    parts += ["## Stages", _table(["stage", "", "seconds", "output"], stage_rows(summary))]
    return "\n\n".join(parts) + "\n"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that stays text inside a line of Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else " " if c in "\r\n" else c for c in text)


def answer_text(answer: dict[str, Any]) -> str:
    """A prompt with its continuations."""
    choices = answer.get("choices", [answer])  # several where the recipe asks for `n`
    return "\n\n".join(answer["prompt"] + choice["text"] for choice in choices)


def _quoted(answer: dict[str, Any]) -> str:
    """An answer as a code block: whatever the model wrote, it can't be read as Markdown."""
    shown = answer_text(answer)
    fence = "```"
    while fence in shown:
        fence += "`"
    return f"{fence}text\n{shown}\n{fence}"
