"""AWQ of AutoAWQ, version gemm: read as a float model, written by conversions.

`qweight` int32 [in, out / 8], eight output channels in a word in the order 0 2 4 6 1 3 5 7; `qzeros` int32
[groups, out / 8], likewise; `scales` [groups, out]. The weight is (code - zero) · scale (AutoAWQ,
awq/utils/packing_utils.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.integers import ColumnFormat, fields, words
from qtool.errors import InputError
from qtool.scheme import W4A16, W4A16_ASYMMETRIC

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of output channels 0 to 7


class Awq(ColumnFormat):
    name = "awq"
    title = "integers of AWQ"
    files = ("quant_config.json",)
    widths = (4,)
    schemes = (W4A16, W4A16_ASYMMETRIC)
    has_zero_points = True

    def packed_shape(self, checkpoint: Checkpoint, name: str) -> tuple[int, int]:
        version = str(self._setting(checkpoint, "version") or "gemm").lower()
        if version != "gemm":
            raise InputError(
                f"awq of version {version!r} can't be read",
                where=str(checkpoint.path / "config.json"),
                hint="qtool reads version gemm; quantize the original model",
            )
        width, words = self._words(checkpoint, name)
        return words * 32 // self.bits(checkpoint), width

    def unpack(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        return fields(words, bits)[..., _PLACES].flatten(1)

    def unpack_zeros(self, checkpoint: Checkpoint, words: torch.Tensor, bits: int) -> torch.Tensor:
        return self.unpack(words, bits)

    def pack(self, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        channels = [_PLACES.index(place) for place in range(len(_PLACES))]  # of the places in a word
        packed = (words(each.unflatten(1, (-1, len(channels)))[..., channels], bits) for each in (codes, zeros))
        return dict(zip(("qweight", "qzeros"), packed, strict=True))

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        return {"zero_point": True, "version": "gemm", "modules_to_not_convert": [*kept, "lm_head"]}
