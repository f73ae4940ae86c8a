"""What vLLM itself computes: its logits for the tokens of a text, kernels, number formats and all.

vLLM's log-probabilities as a request returns them are Python objects, one for each token and vocabulary entry. Asking
for one per token has vLLM compute the logits of the whole prompt; they are taken from the model's `compute_logits`
(vllm 0.32, GPUModelRunner._get_prompt_logprobs_dict), which needs the engine in this very process.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from qtool.errors import QtoolError, foreign
from qtool.evaluation.cache import bytes_per_token
from qtool.runtimes import kernels

_BLOCK = 128  # tokens in a block of vLLM's CPU cache


class VllmLogits:
    """A model in vLLM, one window of text at a time.

    Args:
        model: the checkpoint's folder.
        config: its config.json.
        length: tokens of a window.
        engine: EngineArgs of the machine, from `qtool.runtimes.choose`.
        trust_remote_code: allow the checkpoint's own modelling code.

    Raises:
        InputError: vLLM can't load it. QtoolError: vLLM's engine doesn't run in this process.
    """

    def __init__(
        self, model: str, config: dict[str, Any], length: int, engine: dict[str, Any], *, trust_remote_code: bool
    ) -> None:
        from vllm import EngineArgs, LLMEngine

        kernels.register()
        arguments: dict[str, Any] = engine | {
            "model": model,
            "max_model_len": length + 1,
            "max_num_seqs": 1,
            "max_num_batched_tokens": max(length + 1, 2048),
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "generation_config": "vllm",
            "trust_remote_code": trust_remote_code,
        }
        if not torch.cuda.is_available():  # memory that is asked for is touched
            arguments["kv_cache_memory_bytes"] = _cache_bytes(config, length)
        with foreign("vLLM can't load this model", where=model):
            self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._seen: list[torch.Tensor] = []
        self._numbers = itertools.count()
        self.dtype = str(self._engine.vllm_config.model_config.dtype).removeprefix("torch.")
        try:
            self._engine.apply_model(self._listen)
        except Exception as error:
            raise QtoolError(
                "vLLM's engine runs in a process of its own",
                hint="unset VLLM_ENABLE_V1_MULTIPROCESSING; one device only",
            ) from error

    def _listen(self, model: Any) -> None:
        compute = model.compute_logits

        def listening(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            self._seen.append(logits)
            return logits

        model.compute_logits = listening

    def __call__(self, ids: list[int]) -> torch.Tensor:
        """Logits float32 [len(ids) - 1, vocabulary] of each token that has a next one.

        Raises:
            QtoolError: vLLM computed something else.
        """
        from vllm import SamplingParams

        self._seen.clear()
        parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        self._engine.add_request(str(next(self._numbers)), {"prompt_token_ids": ids}, parameters)
        reported: list[float] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                for token, entry in zip(ids, output.prompt_logprobs or [], strict=False):
                    if entry is not None:
                        reported.append(entry[token].logprob)
        # the logits for the token to sample come by as well
        found = [logits for logits in self._seen if len(logits) == len(ids) - 1]
        if not found or len(reported) != len(ids) - 1:
            raise QtoolError(f"vLLM gave no logits for a prompt of {len(ids)} tokens")
        logits = found[-1].float().cpu()
        told = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        if not torch.allclose(told, torch.tensor(reported), atol=1e-3):
            raise QtoolError("the logits found in vLLM are not those behind its log-probabilities")
        return logits

    def close(self) -> None:
        """Give the model's memory back, so that this process can run another one."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._seen.clear()
        self._engine.engine_core.shutdown()
        del self._engine
        cleanup_dist_env_and_memory()


def _cache_bytes(config: dict[str, Any], length: int) -> int:
    """Room for one window."""
    blocks = -(-(length + 1) // _BLOCK) + 2
    return blocks * _BLOCK * bytes_per_token(config)
