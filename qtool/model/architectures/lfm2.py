"""LFM2, dense and with experts: the norm after the last layer is called embedding_norm."""

from __future__ import annotations

from qtool.model.architectures.architecture import Architecture


class Lfm2(Architecture):
    model_types = ("lfm2", "lfm2_moe")
    final_norm_names = r"embedding_norm"
