"""What mindspore-gs leaves after calibrating through MindFormers, as whole tensors.

Qwen3 and TeleChat2 come in one piece. DeepSeek-V3 comes as one folder per card, rank_0/quant.safetensors and so on,
each with that card's part of every matrix that was split, under Hugging Face's names (mindspore-gs 1.4.1,
models/mindformers_models/deepseekv3.py). Along which axis a matrix was split shows in the source's shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.golden_stick import DESCRIPTION
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError

if TYPE_CHECKING:
    import torch

_OUT = ("weight_scale", "weight_offset", "deq_scale", "bias")
_IN = ("input_scale", "input_offset", "smooth_scale")
_INSIDE = re.compile(r".*\.(layers|h)\.\d+\..*")


class Parts:
    """A folder that `save_quantized` made.

    Attributes:
        types: parameter name → W8A8, W8A8_DYNAMIC or FLOAT.

    Raises:
        QtoolError: no description, or no weights.
    """

    def __init__(self, folder: Path) -> None:
        ranks = sorted(folder.glob("rank_*"), key=lambda path: int(path.name.removeprefix("rank_")))
        files = [sorted(rank.glob("*.safetensors")) for rank in ranks] or [sorted(folder.glob("*.safetensors"))]
        description = folder / DESCRIPTION
        if not description.exists() or not all(files):
            raise QtoolError("mindspore-gs wrote no quantized weights", where=str(folder))
        self.types: dict[str, str] = json.loads(description.read_text(encoding="utf-8"))
        self._files = files

    def tensors(self, source: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint: what lies outside of the decoder layers is the source's own.

        Raises:
            QtoolError: the cards' parts don't make up a tensor.
        """
        from safetensors import safe_open

        with ExitStack() as stack:
            cards: list[dict[str, Any]] = []
            for files in self._files:
                opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
                cards.append({name: file for file in opened for name in file.keys()})  # noqa: SIM118
            for name in source.names:
                if not _INSIDE.fullmatch(name):
                    yield name, source.tensor(name)
            for name in cards[0]:
                if not _INSIDE.fullmatch(name):
                    continue
                layer, _, part = name.rpartition(".")
                if part == "quant_bias" and len(cards) > 1:
                    weight, offset = (_whole(f"{layer}.{key}", cards, source) for key in ("weight", "input_offset"))
                    yield name, correction(weight, offset)
                else:
                    yield name, _whole(name, cards, source)


def correction(weight: torch.Tensor, input_offset: torch.Tensor) -> torch.Tensor:
    """int32 [out]: -Σ_in input_offset · weight, of which each card of a row-parallel layer has a part."""
    import torch

    return -(weight.to(torch.int32) * input_offset.to(torch.int32)).sum(dim=1, dtype=torch.int32)


def _whole(name: str, cards: Sequence[dict[str, Any]], source: Checkpoint) -> torch.Tensor:
    import torch

    parts = [card[name].get_tensor(name) for card in cards]
    shape = _shape(name, source) or tuple(parts[0].shape)
    if tuple(parts[0].shape) == shape:
        return parts[0]
    for axis, size in enumerate(shape[: parts[0].dim()]):
        if parts[0].shape[axis] != size:
            whole = torch.cat(list(parts), dim=axis)
            if tuple(whole.shape) == shape:
                return whole
    raise QtoolError(
        f"{len(parts)} cards have {list(parts[0].shape)} each, which don't add up to {list(shape)}", where=name
    )


def _shape(name: str, source: Checkpoint) -> tuple[int, ...] | None:
    """The whole tensor's shape, as the float model has it or as it follows from the layer's weight."""
    if name in source:
        return tuple(source.info(name).shape)
    layer, _, part = name.rpartition(".")
    if f"{layer}.weight" not in source:
        return None
    out_size, in_size = source.info(f"{layer}.weight").shape
    return (out_size,) if part in _OUT else (in_size,) if part in _IN else None
