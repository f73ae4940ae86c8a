"""GPTQ of AutoGPTQ and GPTQModel: read as a float model.

`qweight` int32 [in · bits / 32, out], consecutive input channels in a word; `qzeros` int32 [groups, out · bits / 32];
`scales` [groups, out]; `g_idx` int32 [in], the group of each input channel. The weight is (code - zero) · scale.
Zeros are stored less one where checkpoint_format isn't gptq_v2 (GPTQModel, nn_modules/qlinear and utils/model.py:
convert_gptq_v1_to_v2_format).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.checkpoint.formats.integers import ColumnFormat, fields

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint


class Gptq(ColumnFormat):
    name = "gptq"
    title = "integers of GPTQ"
    files = ("quantize_config.json",)
    widths = (2, 4, 8)

    def packed_shape(self, checkpoint: Checkpoint, name: str) -> tuple[int, int]:
        words, out = self._words(checkpoint, name)
        return out, words * 32 // self.bits(checkpoint)

    def unpack(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        return fields(words, bits).transpose(1, 2).flatten(0, 1)

    def unpack_zeros(self, checkpoint: Checkpoint, words: torch.Tensor, bits: int) -> torch.Tensor:
        stored = fields(words, bits).flatten(1)
        return stored if self._setting(checkpoint, "checkpoint_format") == "gptq_v2" else stored + 1
