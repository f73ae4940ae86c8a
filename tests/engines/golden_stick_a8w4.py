"""A8W4 by mindspore-gs 1.4.1 itself: python golden_stick_a8w4.py FOLDER INPUTS.npz OUT GROUP_SIZE

FOLDER is a float DeepSeek-V3. MindFormers 1.7.0 builds it and loads its weights; mindspore-gs's own cell quantizes the
routed experts, with what entered them, [tokens, in] under `linear_fc1` and `linear_fc2` of INPUTS; and its own model
class writes OUT. A GROUP_SIZE of 0 is one scale for each output channel.

Not done here is running the decoder, whose grouped product and attention have kernels on Ascend alone. Weights are
float32, because much of what handles bfloat16 has no kernel on a CPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("LD_LIBRARY_PATH", "")  # mindspore-gs splits it
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
import mindspore
import numpy as np
from mindformers_reads import built  # type: ignore[import-not-found]
from mindspore_gs.ptq import (
    GPTQQuantConfig,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
)
from mindspore_gs.ptq.context import InnerPTQConfig, PTQApproach
from mindspore_gs.ptq.models.mindformers_models.deepseekv3 import DeepSeekV3
from mindspore_gs.ptq.quant_cells.mindformers.linear_gptq_dynamic_quant_wrappers import (
    GptqDynamicQuantLinearCell,
)


def _matmul(left: Any, right: Any) -> Any:
    """Tensor.matmul, which ends the process on a CPU where the product has no columns: after GPTQ's last block."""
    return product(left, right) if right.shape[-1] else mindspore.ops.zeros((*left.shape[:-1], 0), left.dtype)


product, mindspore.Tensor.matmul = mindspore.Tensor.matmul, _matmul


def main(folder: str, inputs: str, output: str, group_size: int) -> None:
    mindspore.runtime.launch_blocking()
    model = DeepSeekV3.__new__(DeepSeekV3)  # its __init__ wants a YAML file and starts MindFormers' services
    model._DeepSeekV3__parameter_dict = None
    model.network = network = built(folder, quantization=None)
    network.load_weights(folder)
    model._after_network_load_weights()
    for parameter in network.get_parameters():
        if parameter.dtype == mindspore.bfloat16:
            parameter.set_dtype(mindspore.float32)
    config, given = _config(group_size), np.load(inputs)
    for name, cell in list(network.cells_and_names()):
        if not name.endswith(".mlp.experts"):
            continue
        for part in ("linear_fc1", "linear_fc2"):
            linear = getattr(cell, part)
            if linear.weight.dtype == mindspore.bfloat16:  # shared with what is no parameter any more
                linear.weight.set_dtype(mindspore.float32)
            setattr(cell, part, _quantized(f"network.{name}.{part}", linear, given[part], config))
    network.update_parameters_name()  # as mindspore-gs does after a decoder layer
    model.save_quantized(output)


def _config(group_size: int) -> Any:
    per = QuantGranularity.PER_GROUP if group_size else QuantGranularity.PER_CHANNEL
    wanted = PTQConfig(
        mode=PTQMode.QUANTIZE,
        weight_quant_dtype=mindspore.dtype.qint4x2,
        act_quant_dtype=mindspore.dtype.int8,
        act_quant_granularity=QuantGranularity.PER_TOKEN,
        weight_quant_granularity=per,
        group_size=group_size,
        precision_recovery=PrecisionRecovery.GPTQ,
        algo_args=GPTQQuantConfig(desc_act=True, static_groups=True),
    )
    made = InnerPTQConfig.inner_config(wanted, approach=PTQApproach.PTQ)
    made.experimental = True
    return made


def _quantized(name: str, linear: Any, inputs: np.ndarray, config: Any) -> Any:
    cell = GptqDynamicQuantLinearCell(name, linear, config, config)
    cell.samples.append(mindspore.Tensor(inputs))
    cell.process()
    return cell.deploy()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
