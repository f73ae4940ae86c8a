"""What must be known of families of models: a description that fits most, and one small file for each exception.

To add a family: a subclass of `Architecture` in a file of its own here, and its name in `_EXCEPTIONS`.
"""

from __future__ import annotations

from qtool.model.architectures.architecture import Architecture, FusedExperts
from qtool.model.architectures.float32 import Float32
from qtool.model.architectures.jamba import Jamba
from qtool.model.architectures.llama4 import Llama4
from qtool.model.architectures.longcat import LongCat

__all__ = ["Architecture", "FusedExperts", "of"]

_EXCEPTIONS: tuple[type[Architecture], ...] = (Float32, Jamba, Llama4, LongCat)


def of(model_type: str) -> Architecture:
    """The description for config.json's model_type (of the text model, where there are others beside it)."""
    return next((each() for each in _EXCEPTIONS if model_type in each.model_types), Architecture())
