"""Computes the linears of a golden-stick checkpoint as vLLM-MindSpore 0.5.1 would, but on this CPU.

python vllm_mindspore_on_cpu.py MODEL INPUTS OUTPUTS, by an interpreter with MindSpore, the plugin being importable.

All of the plugin's code that reads the checkpoint is its own: which layer is of which type, the parameters, what is
made of them, and what the kernels get. Replaced are the two kernels, which need Ascend, and vLLM's base classes, which
hold no code here. INPUTS (.npz) has a float32 [n, in] for each linear as vLLM fuses them
("model.layers.0.mlp.gate_up_proj"); OUTPUTS gets its result [n, out] in float32, or nothing where the plugin computes
with floats.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

SHARDS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def module(name: str, **content: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content, __path__=[])
    sys.modules[name] = made
    return made


def set_attributes(parameter: Any, attributes: dict[str, Any]) -> None:
    for key, value in attributes.items():
        setattr(parameter, key, value)


def quant_batch_matmul(
    x1: Any, x2: Any, scale: Any, offset: Any, bias: Any, pertoken_scale: Any, **options: Any
) -> Any:
    """(x1 · x2ᵀ + bias) · scale over integers."""
    assert options["transpose_x2"]
    assert offset is None
    assert pertoken_scale is None
    integers = x1.asnumpy().astype(np.int64) @ x2.asnumpy().astype(np.int64).T + bias.asnumpy()
    return mindspore.Tensor((integers * scale.asnumpy().astype(np.float64)).astype(np.float32))


class QuantV2:
    """x / scale + offset, rounded."""

    def __call__(self, x: Any, scale: Any, offset: Any, sqrt_mode: bool, rounding: str, dtype: Any) -> Any:
        assert (sqrt_mode, rounding, dtype) == (False, "ROUND", mindspore.int8)
        steps = np.rint(x.asnumpy() / scale.asnumpy()) + offset.asnumpy()
        return mindspore.Tensor(np.clip(steps, -128, 127).astype(np.int8))


import mindspore  # noqa: E402

module("ms_custom_ops", trans_data=lambda weight, transdata_type: weight, quant_batch_matmul=quant_batch_matmul)
for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.quantization"):
    module(name)
module("vllm.model_executor.layers.quantization.base_config", QuantizationConfig=object, QuantizeMethodBase=object)
module("vllm.model_executor.layers.linear", LinearMethodBase=object)
module("vllm.model_executor.utils", set_weight_attrs=set_attributes)
found = importlib.util.find_spec("vllm_mindspore")
assert found is not None
assert found.origin is not None
plugin = Path(found.origin).parent
# their __init__ patch vLLM and import all models
for name in ("", ".model_executor", ".model_executor.layers", ".model_executor.layers.quantization"):
    module(f"vllm_mindspore{name}").__path__ = [str(plugin.joinpath(*name.split(".")))]
module("vllm_mindspore.utils", is_310p=lambda: False)
Float = type("UnquantizedLinearMethod", (), {})
module(
    "vllm_mindspore.model_executor.layers.linear", UnquantizedLinearMethod=Float, RowParallelLinear=type("Row", (), {})
)
embedding = type("VocabParallelEmbedding", (), {})
module("vllm_mindspore.model_executor.layers.vocab_parallel_embedding", VocabParallelEmbedding=embedding)
mindspore.ops.auto_generate.QuantV2 = QuantV2

from vllm_mindspore.model_executor.layers.quantization.golden_stick import (  # type: ignore[import-not-found]  # noqa: E402
    golden_stick,
)


def read(folder: Path) -> tuple[dict[str, Any], Any]:
    """All tensors of a checkpoint by name, and what the plugin makes of its description."""
    stored: dict[str, Any] = {}
    for shard in folder.glob("*.safetensors"):
        stored |= mindspore.load_checkpoint(str(shard), format="safetensors")
    file, *_ = golden_stick.GoldenStickConfig.get_config_filenames()
    return stored, golden_stick.GoldenStickConfig.from_config(json.loads((folder / file).read_text()))


def parts(prefix: str) -> list[str]:
    """The files' names of what vLLM fuses into the linear of this name."""
    parent, _, last = prefix.rpartition(".")
    return [f"{parent}.{name}".lstrip(".") for name in SHARDS.get(last, (last,))]


def linear(prefix: str, stored: dict[str, Any], config: Any) -> tuple[Any, Any] | None:
    """The plugin's method for one linear, and the layer with its parameters filled; None where it is float."""
    shards = parts(prefix)
    layer = mindspore.nn.Cell()
    method = config.get_quant_method(layer, prefix)
    if isinstance(method, Float):
        return None
    sizes = [stored[f"{name}.weight"].shape[0] for name in shards]
    width = stored[f"{shards[0]}.weight"].shape[1]
    method.create_weights(layer, width, sizes, width, sum(sizes), mindspore.bfloat16)
    for part, parameter in layer.parameters_and_names():
        given = [stored[f"{name}.{part}"] for name in shards]
        assert all(value.dtype == parameter.dtype for value in given), f"{prefix}.{part}: {given}"
        values = [value.astype(mindspore.float32).asnumpy() for value in given]
        if hasattr(parameter, "output_dim"):
            whole = np.concatenate(values, axis=parameter.output_dim)
        else:
            whole = values[0]
            assert all(np.array_equal(whole, other) for other in values), f"{prefix}.{part} differs between shards"
        assert whole.shape == parameter.shape, f"{prefix}.{part}: {whole.shape}, not {parameter.shape}"
        # what needs bfloat16 here are scales only: exact in float32, which numpy knows
        kind = mindspore.float32 if parameter.dtype == mindspore.bfloat16 else parameter.dtype
        layer.insert_param_to_cell(part, mindspore.Parameter(mindspore.Tensor(whole).astype(kind), name=part), False)
    return method, layer


def main(model: Path, inputs: Path, outputs: Path) -> None:
    stored, config = read(model)
    results = {}
    for prefix, x in np.load(inputs).items():
        if (found := linear(prefix, stored, config)) is not None:
            method, layer = found
            method.process_weights_after_loading(layer)
            result = method.apply(layer, mindspore.Tensor(x)).asnumpy()
            biases = [stored[f"{name}.bias"] for name in parts(prefix) if f"{name}.bias" in stored]
            if biases:  # which is the linear layer's to add
                result = result + np.concatenate([bias.astype(mindspore.float32).asnumpy() for bias in biases])
            results[prefix] = result
    np.savez(outputs, **results)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
