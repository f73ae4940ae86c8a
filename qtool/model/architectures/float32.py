"""Families whose own code mixes float32 with the model's type, and so runs in float32 alone.

transformers 5.19: OpenAI GPT multiplies by a float32 mask, xLSTM's states and XLNet's positions are float32.
"""

from __future__ import annotations

from typing import ClassVar

from qtool.model.architectures.architecture import Architecture


class Float32(Architecture):
    model_types = ("openai-gpt", "xlnet", "xlstm")
    only_float32: ClassVar[bool] = True
