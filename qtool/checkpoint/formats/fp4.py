"""FP4 weights (e2m1) of compressed-tensors, read as floats: `nvfp4-pack-quantized` and `mxfp4-pack-quantized`.

`weight_packed` uint8 [out, in / 2], two neighbours in a byte, the first in its lower half; `weight_scale`
[out, groups]. In NVFP4 a group has 16 input channels and its scale is e4m3, to be divided by `weight_global_scale` [1];
in MXFP4 it has 32, and the scale is the exponent of a power of two plus 127 (compressed-tensors 0.17, compressors/nvfp4
and mxfp4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtool.errors import InputError

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint

PARTS = frozenset(("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"))
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NVFP4, _MXFP4 = 16, 32  # input channels of a group


def is_fp4(group: Mapping[str, Any] | None) -> bool:
    """Whether a group of config.json has such weights."""
    weights = (group or {}).get("weights")
    if not isinstance(weights, Mapping):
        return False
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("group_size"))
    return kind in ((4, "float", _NVFP4), (4, "float", _MXFP4))


@dataclass(frozen=True)
class Fp4:
    """One weight.

    Attributes:
        codes: uint8 [out, in / 2].
        scales: float32 [out, groups].
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        out, half = self.codes.shape
        return out, 2 * half

    def dequantize(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """float32 [stop - start, in]."""
        import torch

        codes, scales = self.codes[start:stop], self.scales[start:stop]
        values = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)], device=codes.device)
        numbers = values[torch.stack((codes & 0xF, codes >> 4), dim=-1).long()].flatten(1)
        return numbers.unflatten(1, (scales.shape[1], -1)).mul_(scales[..., None]).flatten(1)


def shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """(out, in). Raises InputError when the tensors don't fit together."""
    packed, scale = (checkpoint.info(f"{name}.{part}") for part in ("weight_packed", "weight_scale"))
    out, half = packed.shape if len(packed.shape) == 2 else (0, 0)
    size = {"F8_E4M3": _NVFP4, "U8": _MXFP4}.get(scale.dtype)
    if packed.dtype != "U8" or size is None or list(scale.shape) != [out, 2 * half // size] or 2 * half % size:
        raise InputError(
            f"{name}: weight_packed {packed.dtype} {list(packed.shape)} and weight_scale {scale.dtype} "
            f"{list(scale.shape)} don't fit FP4",
            where=str(checkpoint.path),
            hint="the checkpoint is damaged, or config.json belongs to another one; download it again",
        )
    return out, 2 * half


def read(checkpoint: Checkpoint, name: str) -> Fp4:
    """A layer's weight. Raises InputError as `shape`."""
    shape(checkpoint, name)
    scale = checkpoint.tensor(f"{name}.weight_scale")
    if checkpoint.info(f"{name}.weight_scale").dtype == "U8":
        scales = (scale.float() - 127).exp2()
    else:
        scales = scale.float() / checkpoint.tensor(f"{name}.weight_global_scale").float()
    return Fp4(checkpoint.tensor(f"{name}.weight_packed"), scales)
