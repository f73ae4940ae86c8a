"""Jamba: layers of Mamba's first version between attention; vLLM has their linears as floats.

vllm 0.32.0: model_executor/layers/mamba/mamba_mixer.py makes all four without quant_config. Attention and feed-forward,
with most of the weights, are integers there.
"""

from __future__ import annotations

from typing import ClassVar

from qtool.model.architectures.architecture import Architecture


class Jamba(Architecture):
    model_types = ("jamba",)
    float_linears: ClassVar[dict[str, str]] = {
        r"mamba\.(in_proj|x_proj|dt_proj|out_proj)": "vLLM has Mamba's first version as floats only"
    }
