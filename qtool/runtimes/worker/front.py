"""What the runtimes must do alike, so that they can be compared: tokens in, when to stop, how far."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.calibration.template import render
from qtool.calibration.tokenizer import load_tokenizer
from qtool.checkpoint import config as claims
from qtool.errors import ForeignError, InputError, foreign, in_one_line
from qtool.files import exists, read_json
from qtool.runtimes.job import WorkerJob
from qtool.workers import Report

SIZES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size"}
SEEDS = 1 << 63  # they are below it and not negative: vLLM takes -1 for none


@dataclass(frozen=True)
class Prepared:
    """A request made ready.

    Attributes:
        ids: the prompt's token ids.
        budget: most new tokens.
        sampling: the job's sampling under the request's own, by vLLM's names, with `max_tokens` within the budget.
        stop: token ids that end the text; empty when the request ignores them.
        seed: what it draws from; its neighbours have no part in it.
        chat: it was a conversation.
    """

    index: int
    ids: list[int]
    budget: int
    sampling: dict[str, Any]
    stop: list[int]
    seed: int
    chat: bool


class Front:
    """A checkpoint's own side of generating: its tokenizer, its template, its context, its end-of-text tokens.

    Attributes:
        config: config.json.
        text_config: what of it is about the language model, with the names of `SIZES`.
        context: tokens that a prompt and its answer may have together.

    Raises:
        InputError: no usable tokenizer, or no chat template where the job asks for one.
    """

    def __init__(self, job: WorkerJob, report: Report) -> None:
        self.job, self.report = job, report
        folder = Path(job.model)
        self.config = read_json(folder / "config.json")
        claims.check_kinds(self.config, str(folder / "config.json"))
        self.text_config = _named(dict(claims.text_config(self.config)), job)
        self.tokenizer = load_tokenizer(folder, trust_remote_code=job.trust_remote_code)
        self.context = 1 << 20
        self.limit(claims.context(self.text_config) or self.context)
        self.stop = _stop_ids(folder, self.config, self.text_config, self.tokenizer)
        self._cut = self._seen = 0
        if job.chat.required and not self.tokenizer.chat_template:
            raise InputError("the model has no chat template", where=job.model, hint="Leave out --chat and --system.")

    def limit(self, context: int) -> None:
        """The model takes so many tokens; with `max_model_len` no more than that."""
        longest = int(self.job.engine.get("max_model_len") or -1)  # to vLLM -1 is what there is memory for
        self.context = min(context, longest) if longest > 0 else context

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(self.text_config.get("vocab_size") or len(self.tokenizer))

    def prepare(self, request: Mapping[str, Any]) -> Prepared:
        """Token ids and limits of a request (see `qtool.runtimes.stream`).

        Raises:
            InputError: no tokens in it, or more than the model takes; a conversation that its template refuses;
                what was wrong with it from the start.
        """
        if "error" in request:
            raise InputError(request["error"])
        own = request.get("sampling", {})
        sampling = {**self.job.sampling, **own}
        seed = own["seed"] if "seed" in own else sampling.get("seed", 0) + request["index"]
        seed %= SEEDS
        ids = self._ids(request, seed)
        if not ids:
            raise InputError("the tokenizer makes no tokens of it", hint="Give it some text.")
        if len(ids) >= self.context:
            what = f"it has {len(ids)} tokens; the model takes {self.context}, and at least one of them must be new"
            raise InputError(what, hint="Shorten it.")
        room = self.context - len(ids)
        wanted = sampling.get("max_tokens") or room
        budget = min(wanted, room)
        self._seen += 1
        self._cut += budget < wanted
        stop = [] if sampling.get("ignore_eos") else self.stop
        stop = sorted({*stop, *sampling.get("stop_token_ids", ())})
        sampling["max_tokens"] = budget
        return Prepared(request["index"], ids, budget, sampling, stop, seed, "messages" in request)

    def warn(self) -> None:
        """Say how many answers had less room than was asked for."""
        if self._cut:
            context = f"the model takes {self.context} tokens in total"
            self.report.warning(f"{self._cut} of {self._seen} answers may end early: {context}")

    def answer(self, prepared: Prepared, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The item for a finished request."""
        item = {"index": prepared.index, "prompt_tokens": len(prepared.ids), "choices": choices}
        if self.job.extras.ids:
            item["prompt_ids"] = prepared.ids
        else:
            for choice in choices:
                del choice["token_ids"]
        return item

    def _ids(self, request: Mapping[str, Any], seed: int) -> list[int]:
        if "messages" in request:
            return self._conversation(request)
        prompt = request["prompt"]
        if isinstance(prompt, str):
            ids = self._text(prompt)
            return ids if ids or self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        if prompt:
            if outside := [i for i in prompt if not 0 <= i < self.vocabulary]:
                raise InputError(f"token id {outside[0]} is not one of the model's {self.vocabulary}")
            return list(prompt)
        if self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        return [random.Random(seed).randrange(min(len(self.tokenizer), self.vocabulary))]

    def _text(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            prompt.encode()  # not half a surrogate pair
            return list(self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
        except Exception as error:  # a tokenizer may be a program of the model's author, too
            raise InputError(f"the tokenizer refuses it: {in_one_line(error)}") from error

    def _conversation(self, request: Mapping[str, Any]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise InputError("the model has no chat template", hint="Give it as a prompt.")
        extra = {**self.job.chat.template_kwargs, **request.get("chat_template_kwargs", {})}
        options = {"add_generation_prompt": True, **extra}
        return self._text(render(self.tokenizer, request["messages"], "it", **options), add_special_tokens=False)


def _named(config: dict[str, Any], job: WorkerJob) -> dict[str, Any]:
    """With sizes by the names that most models have; where some are missing, as in GPT-2's, transformers knows them."""
    if config.keys() >= SIZES:
        return config
    from transformers import AutoConfig

    options = {"trust_remote_code": job.trust_remote_code, "local_files_only": True}
    try:
        with foreign("transformers doesn't know this model", where=job.model):
            known = AutoConfig.from_pretrained(job.model, **options).get_text_config()
    except ForeignError:  # the runtime may know it all the same
        return config
    return config | {name: value for name in SIZES if (value := getattr(known, name, None)) is not None}


def _stop_ids(folder: Path, config: dict[str, Any], text_config: dict[str, Any], tokenizer: Any) -> list[int]:
    """Every end-of-text token: generation_config.json's if it names any, else config.json's; and the tokenizer's."""
    file = folder / "generation_config.json"
    generation = read_json(file) if exists(file) else {}
    claims.check_kinds(generation, str(file))
    named: set[int] = {tokenizer.eos_token_id} - {None}
    for source in (generation, config, text_config):
        if (ids := source.get("eos_token_id")) is not None:
            return sorted(named | set(ids if isinstance(ids, list) else [ids]))
    return sorted(named)


def failure(index: int, error: InputError) -> dict[str, Any]:
    """The item for a request that can't be answered."""
    return {"index": index, "error": error.what}
