"""GPTQ of AutoGPTQ and GPTQModel: read as a float model, written by conversions.

`qweight` int32 [in · bits / 32, out], consecutive input channels in a word; `qzeros` int32 [groups, out · bits / 32];
`scales` [groups, out]; `g_idx` int32 [in], the group of each input channel. The weight is (code - zero) · scale.
Zeros are stored less one where checkpoint_format isn't gptq_v2 (GPTQModel, nn_modules/qlinear and utils/model.py:
convert_gptq_v1_to_v2_format).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.integers import ColumnFormat, fields, words
from qtool.scheme import W4A16, W8A16

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint


class Gptq(ColumnFormat):
    name = "gptq"
    title = "integers of GPTQ"
    files = ("quantize_config.json",)
    widths = (2, 4, 8)
    schemes = (W4A16, W8A16)
    written = (4, 8)

    def packed_shape(self, checkpoint: Checkpoint, name: str) -> tuple[int, int]:
        words, out = self._words(checkpoint, name)
        return out, words * 32 // self.bits(checkpoint)

    def unpack(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        return fields(words, bits).transpose(1, 2).flatten(0, 1)

    def unpack_zeros(self, checkpoint: Checkpoint, words: torch.Tensor, bits: int) -> torch.Tensor:
        stored = fields(words, bits).flatten(1)
        return stored if self._setting(checkpoint, "checkpoint_format") == "gptq_v2" else stored + 1

    def pack(self, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        import torch

        per_word, width, groups = 32 // bits, len(codes), len(zeros)
        return {
            "qweight": words(codes.unflatten(0, (-1, per_word)).transpose(1, 2), bits),
            "qzeros": words((zeros - 1).unflatten(1, (-1, per_word)), bits),
            "g_idx": torch.arange(width, dtype=torch.int32) // (width // groups),
        }

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        # vLLM 0.32 and GPTQModel leave out what matches a pattern after a minus.
        exceptions: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in kept}
        rest = {"dynamic": exceptions} if exceptions else {}
        return {"sym": True, "desc_act": False, "checkpoint_format": "gptq", "lm_head": False, **rest}
