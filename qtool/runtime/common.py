"""What both runtimes must do alike, so that they can be compared: tokens in, when to stop, text out."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.errors import InputError
from qtool.workers import Report

DTYPES = ("bfloat16", "float16", "float32")
REPORT_SECONDS = 0.1


@dataclass
class Work:
    """A job made ready: prompts as token ids, and for each how many tokens may follow.

    Attributes:
        prompts: token ids per prompt.
        budgets: most new tokens per prompt.
        stop: token ids that end a text; empty when the job ignores them.
        dtype: the name of the dtype in which both runtimes compute.
    """

    tokenizer: Any
    config: dict[str, Any]
    prompts: list[list[int]]
    budgets: list[int]
    stop: list[int]
    dtype: str

    def answer(self, job: dict[str, Any], index: int, token_ids: list[int], gaps: list[float]) -> dict[str, Any]:
        """The item for a finished prompt."""
        prompt = job["prompts"][index]
        return {
            "index": index,
            "prompt": prompt if isinstance(prompt, str) else None,
            "prompt_ids": self.prompts[index],
            "text": self.tokenizer.decode(token_ids, skip_special_tokens=True),
            "token_ids": token_ids,
            "finish_reason": "stop" if token_ids and token_ids[-1] in self.stop else "length",
            "prompt_tokens": len(self.prompts[index]),
            "completion_tokens": len(token_ids),
        } | ({"gaps": gaps} if job["gaps"] else {})


class Meter:
    """Counts generated tokens, reports them now and then, and keeps the times of the cold start."""

    def __init__(self, report: Report, total: int) -> None:
        self.report, self.total, self.done = report, total, 0
        self.seconds: dict[str, float] = {}
        self._began = self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        """The time since the last lap was spent on `stage`."""
        self.seconds[stage] = round(time.monotonic() - self._last, 3)
        self._last = time.monotonic()

    def add(self, tokens: int, saved: int = 0) -> None:
        """`tokens` more are there; `saved` will not be needed, their text has ended."""
        if not self.done:
            self.lap("first token")
        self.done += tokens
        self.total -= saved
        now = time.monotonic()
        if now - self._last >= REPORT_SECONDS or self.done >= self.total:
            self._last = now
            self.report.progress("generate", self.done, self.total, unit="tokens")


def prepare(job: dict[str, Any], report: Report) -> Work:
    """Tokenize the prompts and settle lengths.

    Raises:
        InputError: no usable tokenizer, a prompt without tokens, a prompt longer than the model's context.
    """
    folder = Path(job["model"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text_config = config.get("text_config") or config
    tokenizer = _tokenizer(folder, job["trust_remote_code"])
    context = text_config.get("max_position_embeddings") or 1 << 20
    prompts, budgets, cut = [], [], 0
    for index, prompt in enumerate(job["prompts"]):
        ids = _ids(prompt, tokenizer, text_config, job["seed"] + index)
        where = f"prompt {index + 1}"
        if not ids:
            raise InputError("the tokenizer makes no tokens of it", where=where, hint="Give it some text.")
        if len(ids) >= context:
            what = f"it has {len(ids)} tokens; the model takes {context}, with at least one of them its own"
            raise InputError(what, where=where, hint="Shorten it.")
        prompts.append(ids)
        budgets.append(min(job["max_tokens"], context - len(ids)))
        cut += budgets[-1] < job["max_tokens"]
    if cut:
        report.warning(f"{cut} of {len(prompts)} answers may end early: the model takes {context} tokens in all")
    stop = [] if job["ignore_eos"] else _stop_ids(folder, config, text_config, tokenizer)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or text_config.get("dtype") or DTYPES[0])
    return Work(tokenizer, config, prompts, budgets, stop, dtype if dtype in DTYPES else DTYPES[0])


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        what = str(error).strip() or type(error).__name__
        own_code = "trust_remote_code" in what
        hint = "If you trust its author, add --trust-remote-code." if own_code else "Copy its tokenizer files there."
        what = "the tokenizer is Python code of the model's own" if own_code else f"no usable tokenizer: {what[:300]}"
        raise InputError(what, where=str(folder), hint=hint) from error


def _ids(prompt: str | list[int], tokenizer: Any, text_config: dict[str, Any], seed: int) -> list[int]:
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        return ids if ids or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if prompt:
        return prompt
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return [random.Random(seed).randrange(min(len(tokenizer), text_config["vocab_size"]))]


def _stop_ids(folder: Path, config: dict[str, Any], text_config: dict[str, Any], tokenizer: Any) -> list[int]:
    """Every end-of-text token: generation_config.json's if it names any, else config.json's; and the tokenizer's."""
    file = folder / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    named: set[int] = {tokenizer.eos_token_id} - {None}
    for source in (generation, config, text_config):
        if (ids := source.get("eos_token_id")) is not None:
            return sorted(named | set(ids if isinstance(ids, list) else [ids]))
    return sorted(named)
