"""What SGLang 0.5.23, on an NVIDIA GPU, takes of checkpoints: python sglang_reads.py FOLDER..., lines of JSON as of
vllm_reads.

Its own code reads the quantization_config, finds each layer's scheme, makes the parameters and fills them from the
files. Replaced are kernels, communication and packages that only computing needs, and the answer to which GPU there is.
Nothing is computed.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

os.environ["SGLANG_ENABLE_TORCH_COMPILE"] = "0"

from qtool.workers import hide_media_packages

hide_media_packages()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor  # noqa: E402, F401 (before torchvision is faked)

ABSENT = ("IPython", "orjson", "sgl_kernel", "soundfile", "torchvision")
REPLACED = (
    "cuda",
    "flashinfer",
    "llguidance",
    "outlines",
    "sglang.jit_kernel",
    "sglang.kernels.jit",
    "sglang.kernels.ops",
    "sglang.srt.distributed.device_communicators",
    "torchao",
    "tvm_ffi",
    "xgrammar",
)
MODULES = {
    "DeepseekV3ForCausalLM": "deepseek_v2",
    "Glm4MoeForCausalLM": "glm4_moe",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

sys.path.insert(0, str(Path(__file__).parent))
from replacing import Replacer  # type: ignore[import-not-found]  # noqa: E402

sys.modules.pop("torchvision", None)
sys.meta_path.insert(0, Replacer((*REPLACED, "torchvision")))
sys.meta_path.append(Replacer(ABSENT))
import xgrammar  # noqa: E402

xgrammar.__dict__["StructuralTag"] = dict  # a field of a pydantic model
torch.cuda.get_device_capability = lambda *_: (9, 0)

from sglang.srt.distributed import parallel_state  # type: ignore[import-not-found]  # noqa: E402
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (  # type: ignore[import-not-found]  # noqa: E402
    CompressedTensorsConfig,
)
from sglang.srt.runtime_context import derive_spawn_ranks, get_parallel  # type: ignore[import-not-found]  # noqa: E402
from sglang.srt.server_args import (  # type: ignore[import-not-found]  # noqa: E402
    ServerArgs,
    set_global_server_args_for_scheduler,
)
from sglang.srt.utils import custom_op  # type: ignore[import-not-found]  # noqa: E402

custom_op.register_custom_op = lambda op=None, **_: op if op is not None else lambda function: function

from watching import Watched, empty, is_untouched, watched  # type: ignore[import-not-found]  # noqa: E402


def prepare(folder: str) -> None:
    set_global_server_args_for_scheduler(ServerArgs(model_path=folder, device="cpu", attention_backend="torch_native"))
    one = ("tp_size", "attn_cp_size", "attn_tp_size", "moe_dp_size", "moe_ep_size")
    ranks = derive_spawn_ranks(world_rank=0, ep_join_rank_offset=0, **dict.fromkeys(one, 1))
    get_parallel().override_permanently(**ranks, attn_tp_rank=0, attn_dp_rank=0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    parallel_state.initialize_model_parallel(backend="gloo")


def read(folder: str) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder)
    entry = importlib.import_module(f"sglang.srt.models.{MODULES[config.architectures[0]]}").EntryClass
    known = {each.__name__: each for each in (entry if isinstance(entry, list) else [entry])}
    made = known[config.architectures[0]]
    # as _get_quantization_config of model_loader/loader.py
    packed = getattr(made, "packed_modules_mapping", {})
    quantization = CompressedTensorsConfig.from_config({**config.quantization_config, "packed_modules_mapping": packed})
    torch.set_default_dtype(torch.bfloat16)
    model = made(config=config, quant_config=quantization)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        empty(parameter)
    names: set[str] = set()
    Watched.looked_into = set()
    files = sorted(Path(folder).glob("*.safetensors"))
    model.load_weights(watched(((name, t) for file in files for name, t in load_file(file).items()), names))
    return {
        "parameters": len(parameters),
        "untouched": sorted(name for name, parameter in parameters.items() if is_untouched(parameter)),
        "tensors": len(names & Watched.looked_into),
        "unread": sorted(names - Watched.looked_into),
    }


def main(folders: list[str]) -> None:
    prepare(folders[0])
    for folder in folders:
        try:
            found = read(folder)
        except Exception as error:
            if os.environ.get("TRACE"):
                import traceback

                traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print("\n" + json.dumps({"model": folder, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
