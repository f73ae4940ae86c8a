"""GPT-J and CodeGen: decoder layers return a tuple, and the base model takes the hidden states out of it."""

from __future__ import annotations

from qtool.model.architectures.architecture import Architecture


class GptJ(Architecture):
    model_types = ("gptj", "codegen")
    layers_return_tuples = True
