"""MXFP4 of gpt-oss, as OpenAI publishes it: experts in FP4 (e2m1), all else in bfloat16; read as a float model.

`NAME_blocks` uint8 [experts, out, groups, 16] has two neighbouring input channels in a byte, the first in its lower
half; `NAME_scales` uint8 [experts, out, groups] is the exponent of a power of two plus 127, for 32 input channels.
Together they are the float model's NAME [experts, in, out] (transformers 5.19, integrations/mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.base import Format, quantization_method
from qtool.checkpoint.formats.fp4 import Fp4
from qtool.errors import InputError
from qtool.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
_BYTES = 16  # of a group


class Mxfp4(Format):
    name = METHOD
    title = "FP4 experts with a power of two per 32 channels"
    is_float = True

    def detect(self, config: Mapping[str, Any], files: Container[str]) -> bool:
        return quantization_method(config) == METHOD

    def scheme(self, checkpoint: Checkpoint, name: str) -> Scheme | None:
        return None

    def has_lost(self, checkpoint: Checkpoint, name: str) -> bool:
        # Experts have names of their own only once they are read one by one.
        module = name.rpartition(".experts.")[0]
        return bool(module) and f"{module}.experts.down_proj{BLOCKS}" in checkpoint


def fused(checkpoint: Checkpoint) -> frozenset[str]:
    """The float model's names of the tensors that lie so."""
    if quantization_method(checkpoint.config) != METHOD:
        return frozenset()
    return frozenset(name.removesuffix(BLOCKS) for name in checkpoint.names if name.endswith(BLOCKS))


def shape(checkpoint: Checkpoint, name: str) -> tuple[int, int, int]:
    """(experts, in, out). Raises InputError when the tensors are missing or don't fit together."""
    blocks, scales = (checkpoint.info(f"{name}{part}") for part in (BLOCKS, SCALES))
    if (
        (blocks.dtype, scales.dtype) != ("U8", "U8")
        or len(blocks.shape) != 4
        or blocks.shape[3] != _BYTES
        or list(blocks.shape[:3]) != list(scales.shape)
    ):
        raise InputError(
            f"{name}: blocks {blocks.dtype} {list(blocks.shape)} and scales {scales.dtype} {list(scales.shape)} "
            "don't fit MXFP4",
            where=str(checkpoint.path),
            hint="the checkpoint is damaged, or config.json belongs to another one; download it again",
        )
    experts, out, groups, _ = blocks.shape
    return experts, groups * 2 * _BYTES, out


def read(checkpoint: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
    """Some experts, float32 [stop - start, in, out]. Raises InputError as `shape`."""
    import torch

    _, width, out = shape(checkpoint, name)
    parts = []
    for expert in range(start, stop):
        codes = checkpoint.row_range(f"{name}{BLOCKS}", expert, expert + 1).reshape(out, width // 2)
        scales = (checkpoint.row_range(f"{name}{SCALES}", expert, expert + 1)[0].float() - 127).exp2()
        parts.append(Fp4(codes, scales).dequantize().t())
    return torch.stack(parts)
