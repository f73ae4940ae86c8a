"""GPT-J: its decoder layers return a tuple, and its base model takes the hidden states out of it."""

from __future__ import annotations

from qtool.model.architectures.architecture import Architecture


class GptJ(Architecture):
    model_types = ("gptj",)
    layers_return_tuples = True
