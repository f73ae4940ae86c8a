"""The reference runtime: transformers' own model code, one plain decoding loop.

Greedy decoding runs every prompt alone, so that nothing but the checkpoint decides; sampling takes
prompts of equal length together.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.auto import auto_class
from qtool.errors import ForeignError, InputError, QtoolError, foreign
from qtool.runtimes.job import WorkerJob
from qtool.runtimes.transformers import RUNTIME
from qtool.runtimes.worker.front import Front, Prepared, failure
from qtool.runtimes.worker.meter import Meter
from qtool.workers import Report, hide_media_packages

if TYPE_CHECKING:
    import torch

BATCH = 16
TAKEN = 64  # requests among which those of equal length are looked for


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Answer `report.inputs` as `qtool.runtimes.stream` says. `job` is a `WorkerJob`, the result a `Generated`."""
    meter = Meter(report)
    report.progress("load the model", 0, 0)
    hide_media_packages()
    import torch

    torch.set_grad_enabled(False)
    front = Front(WorkerJob.from_json(job), report)
    meter.lap("import")
    model = _load(front.job, report)
    meter.lap("load")
    meter.begin()
    while not report.inputs.ended:
        for rows in _batches(_take(front, report)):
            with foreign("transformers can't run this model", where=front.job.model):
                _decode(model, front, rows, meter)
    front.warn()
    return meter.end("transformers")


def _load(job: WorkerJob, report: Report) -> Any:
    import torch
    from transformers import AutoConfig

    allowed = {"trust_remote_code": job.trust_remote_code, "local_files_only": True}
    try:
        with foreign("transformers can't load this model", where=job.model):
            model, found = auto_class(AutoConfig.from_pretrained(job.model, **allowed)).from_pretrained(
                job.model,
                dtype=getattr(torch, job.dtype),
                device_map="cuda" if torch.cuda.is_available() else "cpu",
                output_loading_info=True,
                **allowed,
            )
    except ForeignError as error:
        if "trust_remote_code" in str(error.__cause__):
            hint = "If you trust its author, add --trust-remote-code."
            raise InputError("the model needs Python code that comes with it", where=job.model, hint=hint) from error
        raise
    _check_found(found, model, job.model, report)
    return model.eval()


def _check_found(found: Mapping[str, Any], model: Any, where: str, report: Report) -> None:
    """Raises InputError when transformers has filled parameters with random numbers, or left a part of one aside.

    What belongs to no module of the model, like a layer that predicts further tokens, is only told.
    """
    modules = {name for name, _ in model.named_modules()}
    unexpected = sorted(found["unexpected_keys"])
    parts = [name for name in unexpected if name.rpartition(".")[0] in modules]
    for what, names in (
        ("lacks tensors that transformers needs", sorted(found["missing_keys"])),
        ("has tensors of another shape than config.json says", [str(each[0]) for each in found["mismatched_keys"]]),
        ("has tensors that transformers doesn't read", parts),
    ):
        if names:
            hint = "what transformers would run is another model; use another runtime, or download the model again"
            raise InputError(f"the checkpoint {what}: {_some(names)}", where=where, hint=hint)
    if unexpected:
        report.warning(f"transformers leaves tensors aside: {_some(unexpected)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ("" if len(names) <= 3 else f" and {len(names) - 3} more")


def _take(front: Front, report: Report) -> Iterator[Prepared]:
    """Waits for a request, then takes those that are there already."""
    for count in range(TAKEN):
        if (request := report.inputs.take(0 if count else None)) is None:
            return
        try:
            prepared = front.prepare(request)
            if unknown := sorted(prepared.sampling.keys() - (RUNTIME.sampling or set())):
                raise InputError(f"transformers as a runtime can't do {', '.join(unknown)}")
            yield prepared
        except InputError as error:
            report.item(failure(request["index"], error))


def _batches(taken: Iterator[Prepared]) -> list[list[Prepared]]:
    """Requests of equal length and sampling together, greedy ones alone, in their order."""
    groups: dict[str, list[Prepared]] = {}
    for prepared in taken:
        sampling = {name: value for name, value in prepared.sampling.items() if name != "seed"}
        alone = prepared.index if not sampling.get("temperature", 1.0) else None
        groups.setdefault(f"{alone} {len(prepared.ids)} {sampling} {prepared.stop}", []).append(prepared)
    batches = [rows[i : i + BATCH] for rows in groups.values() for i in range(0, len(rows), BATCH)]
    return sorted(batches, key=lambda rows: rows[0].index)


def _decode(model: Any, front: Front, rows: list[Prepared], meter: Meter) -> None:
    import torch

    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    generators = [torch.Generator().manual_seed(row.seed) for row in rows]
    tokens: list[list[int]] = [[] for _ in rows]
    gaps: list[list[float]] = [[] for _ in rows]
    shown = [""] * len(rows)
    running = set(range(len(rows)))
    sampling, budget, stop = rows[0].sampling, rows[0].budget, rows[0].stop
    inputs, cache = torch.tensor([row.ids for row in rows]), None
    while running:
        output = model(input_ids=inputs.to(model.device), past_key_values=cache, use_cache=True, **keep)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu()
        if logits.isnan().any():
            hint = "Is a weight NaN or out of its dtype's range? `qtool inspect` shows the checkpoint."
            raise QtoolError("the model computes NaN", where=front.job.model, hint=hint)
        seen = [[*row.ids, *tokens[i]] for i, row in enumerate(rows)]
        chosen = pick(penalize(logits, seen, sampling.get("repetition_penalty", 1.0)), sampling, generators)
        top = logits.topk(2).values
        for row in sorted(running):
            tokens[row].append(int(chosen[row]))
            gaps[row].append(float(top[row, 0] - top[row, 1]))
            ended = tokens[row][-1] in stop
            stopped = rows[row].index in meter.report.inputs.aborted
            over = ended or stopped or len(tokens[row]) == budget
            if front.job.extras.pieces:
                shown[row] = _stream(front, rows[row], tokens[row], shown[row], over)
            if over:
                running.remove(row)
                meter.add(len(tokens[row]))
                reason = "stop" if ended else "abort" if stopped else "length"
                meter.report.item(front.answer(rows[row], [_choice(front, tokens[row], reason, gaps[row])]))
        inputs = chosen[:, None]


def _choice(front: Front, tokens: list[int], reason: str, gaps: list[float]) -> dict[str, Any]:
    choice = {
        "text": front.tokenizer.decode(tokens, skip_special_tokens=True),
        "token_ids": tokens,
        "finish_reason": reason,
        "completion_tokens": len(tokens),
    }
    return choice | ({"gaps": gaps} if front.job.extras.gaps else {})


def _stream(front: Front, row: Prepared, tokens: list[int], shown: str, over: bool) -> str:
    """Tell the text that is new, except half a character at its end; returns what has been told."""
    text = front.tokenizer.decode(tokens, skip_special_tokens=True)
    if not over and text.endswith("\N{REPLACEMENT CHARACTER}"):
        return shown
    front.report.send(event="piece", index=row.index, text=text[len(shown) :])
    return str(text)


def penalize(logits: torch.Tensor, seen: list[list[int]], penalty: float) -> torch.Tensor:
    """Logits float32 [rows, vocabulary] with those of tokens that row i has `seen` made less likely (or more).

    As transformers and vLLM do it: above 0 divided by the penalty, below 0 multiplied with it.
    """
    import torch

    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, seen, strict=True):
        index = torch.tensor(sorted(set(ids)))
        values = row[index]
        row[index] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def pick(logits: torch.Tensor, sampling: Mapping[str, Any], generators: list[torch.Generator]) -> torch.Tensor:
    """The next token of each row: logits float32 [rows, vocabulary] -> int64 [rows]. Row i draws from generator i.

    Of `sampling`, temperature, top_k, top_p and min_p count, in vLLM's order: min_p, top_k, top_p.
    """
    import torch

    temperature = sampling.get("temperature", 1.0)
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if min_p := sampling.get("min_p", 0):
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities[:, :1], 0)
    if (top_k := sampling.get("top_k", 0)) > 0:
        probabilities[:, top_k:] = 0
    if (top_p := sampling.get("top_p", 1.0)) < 1:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    pairs = zip(probabilities, generators, strict=True)
    drawn = torch.stack([row.multinomial(1, generator=generator) for row, generator in pairs])
    return order.gather(-1, drawn)[:, 0]
