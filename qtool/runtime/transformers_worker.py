"""The reference runtime: transformers' own model code, one plain decoding loop.

Greedy decoding runs every prompt alone, so that nothing but the checkpoint decides; sampling takes
prompts of equal length together.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from qtool.errors import InputError, QtoolError
from qtool.runtime.common import Meter, Work, prepare
from qtool.workers import Report, hide_media_packages

if TYPE_CHECKING:
    import torch

BATCH = 16


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Generate as `qtool.runtime.generate` says; returns the runtime's name and the seconds each stage took."""
    meter = Meter(report, 0)
    report.progress("load the model", 0, 0)
    hide_media_packages()
    import torch

    torch.set_grad_enabled(False)
    work = prepare(job, report)
    meter.lap("import")
    model = _load(job, work)
    meter.lap("load")
    meter.total = sum(work.budgets)
    for rows in _batches(work, 1 if job["temperature"] == 0 else BATCH):
        _decode(model, work, job, rows, meter)
    return {"runtime": "transformers", "seconds": meter.seconds}


def _load(job: dict[str, Any], work: Work) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            job["model"],
            dtype=getattr(torch, work.dtype),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            trust_remote_code=job["trust_remote_code"],
            local_files_only=True,
        )
    except ValueError as error:
        if "trust_remote_code" in str(error):
            hint = "If you trust its author, add --trust-remote-code."
            raise InputError("the model is Python code of its own", where=job["model"], hint=hint) from error
        raise
    return model.eval()


def _batches(work: Work, size: int) -> list[list[int]]:
    """Indexes of the prompts, in groups of equal length and budget."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (ids, budget) in enumerate(zip(work.prompts, work.budgets, strict=True)):
        groups.setdefault((len(ids), budget), []).append(index)
    batches = [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]
    return sorted(batches)


def _decode(model: Any, work: Work, job: dict[str, Any], rows: list[int], meter: Meter) -> None:
    import torch

    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    generators = [torch.Generator().manual_seed(job["seed"] + index) for index in rows]
    tokens: list[list[int]] = [[] for _ in rows]
    gaps: list[list[float]] = [[] for _ in rows]
    running = set(range(len(rows)))
    budget = work.budgets[rows[0]]
    inputs, cache = torch.tensor([work.prompts[index] for index in rows]), None
    while running:
        output = model(input_ids=inputs.to(model.device), past_key_values=cache, use_cache=True, **keep)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu()
        if logits.isnan().any():
            hint = "Is a weight NaN or out of its dtype's range? `qtool inspect` shows the checkpoint."
            raise QtoolError("the model computes NaN", where=job["model"], hint=hint)
        chosen = pick(logits, job["temperature"], job["top_p"], generators)
        top = logits.topk(2).values
        for row in sorted(running):
            tokens[row].append(int(chosen[row]))
            gaps[row].append(float(top[row, 0] - top[row, 1]))
            ended = tokens[row][-1] in work.stop
            meter.add(1, saved=budget - len(tokens[row]) if ended else 0)
            if ended or len(tokens[row]) == budget:
                running.remove(row)
                meter.report.item(work.answer(job, rows[row], tokens[row], gaps[row]))
        inputs = chosen[:, None]


def pick(logits: torch.Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> torch.Tensor:
    """The next token of each row: logits float32 [rows, vocabulary] -> int64 [rows]. Row i draws from generator i."""
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    pairs = zip(probabilities, generators, strict=True)
    drawn = torch.stack([row.multinomial(1, generator=generator) for row, generator in pairs])
    return order.gather(-1, drawn)[:, 0]
