"""Towers for pictures that come from a package of their own, which a model of text does without."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_timm() -> Iterator[None]:
    """Within the block, towers of timm are built empty where that isn't installed.

    Their tensors go from checkpoint to checkpoint as they are. Only a picture needs them, and fails without.
    """
    if importlib.util.find_spec("timm") is not None:
        yield
        return
    from transformers import PreTrainedModel
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

    def empty(self: Any, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        PreTrainedModel.post_init(self)

    saved = TimmWrapperModel.__init__
    TimmWrapperModel.__init__ = empty
    try:
        yield
    finally:
        TimmWrapperModel.__init__ = saved
