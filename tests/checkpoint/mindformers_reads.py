"""What MindFormers 1.7.0, started as vLLM-MindSpore 0.5.1 starts it, takes of golden-stick checkpoints.

python mindformers_reads.py FOLDER..., by an interpreter with MindSpore, both packages being importable. Lines of JSON
as of vllm_reads, with more keys:

- `mistyped`: tensors that were put into a parameter of another kind of numbers, such as int8 into bfloat16;
- `norm`: the first number of the decoder's last norm.

The configuration, the model and all that reads the files are theirs. Replaced are what tests of models don't have
(packages for training), what vLLM says of one card, and the filling of new tensors, which MindSpore has no bfloat16
for on a CPU. Nothing is computed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np

UNUSED = ("deprecated", "jieba", "mindpet", "rouge_chinese", "tensorboardX", "tiktoken")
# What no tensor of the tests holds: rounded weights are in -127..127.
UNSEEN = {"Int8": -128, "Int32": -(2**31), "UInt64": 2**63, "Int4": 0}
# Kept for other readers: a static layer's deq_scale says the same, and no reader of golden-stick wants zero points.
SPARE = re.compile(r"\.(weight_offset|w_offset)$")
SPARE_OF_STATIC = re.compile(r"\.(weight_scale|w_scale)$")


def module(name: str, **content: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content, __path__=[])
    sys.modules[name] = made
    return made


sys.path.insert(0, str(Path(__file__).parent))
from replacing import Replacer  # type: ignore[import-not-found]  # noqa: E402

sys.meta_path.append(Replacer(UNUSED))
import deprecated  # type: ignore[import-untyped]  # noqa: E402

deprecated.deprecated = lambda *_, **__: lambda function: function

import mindspore  # noqa: E402

STORED = {mindspore.qint4x2: np.int8, mindspore.uint64: np.uint64}


def filled(value: float) -> Any:
    def make(*shape: Any, dtype: Any = mindspore.float32, **_: Any) -> Any:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        if dtype in STORED:  # MindSpore casts to neither
            return mindspore.Tensor(np.full(sizes, value, STORED[dtype]), dtype=dtype)
        return mindspore.Tensor(np.full(sizes, value, np.float32)).astype(dtype)

    return make


mindspore.mint.zeros = mindspore.mint.empty = filled(0)
mindspore.mint.ones = filled(1)

# How a tensor lies in an Ascend's memory.
mindspore.ops.auto_generate.format_cast = lambda tensor, layout: tensor

only = Namespace(is_first_rank=True, is_last_rank=True)
module("vllm", envs=Namespace(VLLM_PP_LAYER_PARTITION=None))
module("vllm.config", VllmConfig=object)
module("vllm.distributed", get_pp_group=lambda: only)
module("vllm.logger", init_logger=logging.getLogger)
found = importlib.util.find_spec("vllm_mindspore")
assert found is not None
assert found.origin is not None
plugin = Path(found.origin).parent
for name in ("", ".model_executor", ".model_executor.models", ".model_executor.models.mf_models"):  # no __init__
    module(f"vllm_mindspore{name}").__path__ = [str(plugin.joinpath(*name.split(".")))]
module("vllm_mindspore.utils", is_310p=lambda: False)

from mindformers import AutoModel  # type: ignore[import-not-found]  # noqa: E402
from mindformers.core.context import build_mf_context  # type: ignore[import-not-found]  # noqa: E402
from vllm_mindspore.model_executor.models.mf_models.config import (  # type: ignore[import-not-found]  # noqa: E402
    gen_mf_config,
)


class Slice:
    """A tensor of a file that says when its numbers are asked for."""

    def __init__(self, inner: Any, name: str, taken: set[str]) -> None:
        self._inner, self._name, self._taken = inner, name, taken

    def __getitem__(self, which: Any) -> Any:
        self._taken.add(self._name)
        return self._inner[which]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Asked(dict[str, Any]):
    """A model's parameters, which say who asks for them."""

    def __init__(self, parameters: dict[str, Any], current: list[str], given: dict[str, str]) -> None:
        super().__init__(parameters)
        self._current, self._given = current, given

    def __getitem__(self, name: str) -> Any:
        self._given[self._current[-1]] = name
        return super().__getitem__(name)


def built(folder: str, quantization: str | None = "golden-stick") -> Any:
    """The model as MindFormersForCausalLM of the plugin makes it (mf_models/mindformers.py)."""
    hub = json.loads((Path(folder) / "config.json").read_text())
    hub = {"num_hidden_layers": hub.get("n_layer")} | hub  # as TeleChat2's own configuration class says it
    one = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    config = gen_mf_config(
        Namespace(
            model_config=Namespace(
                dtype="bfloat16", max_model_len=128, quantization=quantization, hf_config=Namespace(**hub)
            ),
            parallel_config=Namespace(**one, enable_expert_parallel=False),
            cache_config=Namespace(block_size=32),
            additional_config=None,
        )
    )
    config.load_checkpoint = config.pretrained_model_dir = folder
    config.model.model_config.use_fused_mla = False  # needs the kernels of ms_custom_ops
    build_mf_context(config)
    return AutoModel.from_config(config)


def unseen(parameter: Any) -> Any:
    """A tensor like the parameter that is all of what nobody has written."""
    return filled(UNSEEN.get(str(parameter.dtype), 0) if is_integer(parameter) else np.nan)(
        tuple(parameter.shape), dtype=parameter.dtype
    )


def is_integer(parameter: Any) -> bool:
    return str(parameter.dtype) in UNSEEN


def is_unseen(parameter: Any) -> bool:
    if parameter.dtype in STORED:  # of a row of int4 some number is not 0
        values = parameter.asnumpy()
        return bool((values == UNSEEN[str(parameter.dtype)]).all(axis=-1).any())
    values = parameter.astype(mindspore.float64 if is_integer(parameter) else mindspore.float32).asnumpy()
    return bool((values == UNSEEN[str(parameter.dtype)]).any() if is_integer(parameter) else np.isnan(values).any())


def read(folder: str, look: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """What of a folder is loaded. `look` gets the network afterwards."""
    network = built(folder)
    parameters = network.model.get_params_dict()
    for parameter in parameters.values():
        parameter.set_data(unseen(parameter))
    names: dict[str, str] = {}  # with the kind of their numbers
    current: list[str] = []
    taken: set[str] = set()
    given: dict[str, str] = {}
    iterate, convert = network._safetensors_weights_iterator, network.convert_name

    def named(name: str) -> str:
        current.append(name)
        return convert(name)

    def watched(files: list[str]) -> Iterator[tuple[str, Any]]:
        network.convert_name = named
        for theirs, tensor in iterate(files):
            names[current[-1]] = tensor.get_dtype()
            yield theirs, Slice(tensor, current[-1], taken)

    network._safetensors_weights_iterator = watched
    network.model.get_params_dict = lambda: Asked(parameters, current, given)
    network.load_weights(folder)
    if look is not None:
        look(network.model)
    static = {name.rpartition(".")[0] for name in names if name.endswith((".deq_scale", ".dequant_scale"))}
    spare = {
        name
        for name in names
        if SPARE.search(name) or (SPARE_OF_STATIC.search(name) and name.rpartition(".")[0] in static)
    }
    kinds = {"I8": ("Int8", "Int4"), "I32": ("Int32",), "U64": ("UInt64",)}
    return {
        "parameters": len(parameters),
        "untouched": sorted(name for name, parameter in parameters.items() if is_unseen(parameter)),
        "tensors": len(names.keys() & taken),
        "unread": sorted(names.keys() - taken - spare),
        "norm": float(parameters["decoder.final_layernorm.weight"].astype(mindspore.float32).asnumpy()[0]),
        "mistyped": sorted(
            tensor
            for tensor, name in given.items()
            if is_integer(parameters[name]) != (names[tensor] in kinds)
            or (names[tensor] in kinds and str(parameters[name].dtype) not in kinds[names[tensor]])
        ),
    }


def main(folders: list[str]) -> None:
    for folder in folders:
        try:
            found = read(folder)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print("\n" + json.dumps({"model": folder, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
