"""A checkpoint as a GGUF file for llama.cpp, by llama.cpp's own converter; a quantized model keeps its integers.

Names, the order of rows inside rotary heads, stacked experts, metadata and the tokenizer are the converter's work. It
knows float tensors only, so it is led through the model three times in step: over the values that the integers stand
for, over the integers, and over their scales. Where the three come out alike, integers and scales are written as they
are, as blocks of 32 numbers: Q8_0 for 5 to 8 bits, Q4_0 for fewer. What it takes apart in another way (of DeepSeek's
kv_b_proj it makes two matrices, the one transposed) is rounded to Q8_0 anew, and the result names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import dtypes
from qtool.checkpoint.summary import float_dtype
from qtool.errors import InputError, foreign
from qtool.gguf.blocks import pack, row_bytes
from qtool.gguf.layers import Layers

if TYPE_CHECKING:
    import numpy as np
    import torch

    from qtool.workers import Report

_STORED = {"F32": "ALL_F32", "F16": "MOSTLY_F16"}  # what stays float, by the model's dtype; else bfloat16


@dataclass
class Found:
    """What became of the quantized layers."""

    integers: int = 0
    rounded: list[str] = field(default_factory=list)
    scale_rounding: float = 0.0


def write(layers: Layers, file: Path, report: Report) -> Found:
    """Make `file`, which is not there yet. What is lost on the way is a warning.

    Raises:
        InputError: llama.cpp's converter doesn't know the model, or fails on it.
        OSError: the disk is full.
    """
    import torch

    found, where = Found(), str(layers.source.path)
    logging.getLogger("hf-to-gguf").setLevel(logging.WARNING)
    with foreign("llama.cpp's converter can't convert this model", where=where), torch.inference_mode():
        _converter(layers, file, found, report).write()
    for warning in _warnings(layers, found):
        report.warning(warning)
    return found


def _converter(layers: Layers, file: Path, found: Found, report: Report) -> Any:
    """llama.cpp's converter for this architecture, which reads the checkpoint through `layers`."""
    import gguf
    import torch
    from conversion import get_model_class
    from conversion.base import LazyTorchTensor, ModelBase, ModelType, get_model_architecture

    folder = layers.source.path
    hparams = ModelBase.load_hparams(folder, False)
    hparams.pop("quantization_config", None)
    architecture = get_model_architecture(hparams, ModelType.TEXT)
    try:
        known = get_model_class(architecture)
    except NotImplementedError:
        hint = "qtool runtimes MODEL lists what runs it."
        raise InputError(f"llama.cpp knows no {architecture}", where=str(folder), hint=hint) from None

    def lazy(read: Callable[[str], torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Any:
        meta = LazyTorchTensor.meta_with_dtype_and_shape(dtype, shape)
        return LazyTorchTensor(meta=meta, args=(name,), func=read)

    done, total = 0, sum(1 for _ in layers.names())

    def values(name: str) -> torch.Tensor:
        nonlocal done
        report.progress("converting", done, total, "tensors")
        done += 1
        return layers.values(name)

    class Shadow(known):  # type: ignore[misc, valid-type]
        """Takes the converter's way with something else than the values, and writes nothing."""

        model_arch = known.model_arch

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:
            return {}

    class Converter(known):  # type: ignore[misc, valid-type]
        """Writes blocks where the shadows come out as the values do."""

        model_arch = known.model_arch

        def __init__(self, *args: Any, **options: Any) -> None:
            self._originals: dict[str, str] = {}
            self._blocks: dict[str, tuple[str, Any, Any, Any]] = {}
            super().__init__(*args, **options)
            self._shadows = Shadow(*args, **options), Shadow(*args, **options)
            self._add = self.gguf_writer.add_tensor
            self.gguf_writer.add_tensor = self._add_tensor

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:
            seen = {}
            for name in layers.names():
                stored = layers.source.info(name).dtype if layers.scheme(name) is None else "F32"
                dtype = dtypes.to_torch(stored)
                kept = self.filter_tensors((name, partial(lazy, values, name, layers.shape(name), dtype)))
                if kept is not None:
                    seen[kept[0]], self._originals[kept[0]] = kept[1], name
            return seen

        def dequant_model(self) -> None:
            """`values` are float already."""

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterable[tuple[str, Any]]:
            made = list(super().modify_tensors(data_torch, name, bid))
            original = self._originals.get(name, "")
            if original and layers.scheme(original) is not None:
                kind = layers.blocks(original)
                numbers, scales = self._shadowed(original, name, bid) if kind else ([], [])
                for (new_name, whole), ours, its in zip_longest(made, numbers, scales, fillvalue=("", None)):
                    if kind and ours[0] == its[0] == new_name and _alike(whole, ours[1], its[1]):
                        self._blocks[new_name] = (kind, ours[1], its[1], whole)
                    elif new_name:
                        found.rounded.append(new_name)
            return made

        def _shadowed(self, original: str, name: str, bid: int | None) -> tuple[list[Any], list[Any]]:
            """What becomes of a tensor's integers and scales; nothing where the converter needs what these are not."""
            integers = lazy(layers.integers, original, layers.shape(original), torch.float32)
            scales = lazy(layers.scales, original, layers.scales_shape(original), torch.float32)
            first, second = self._shadows
            try:
                return list(first.modify_tensors(integers, name, bid)), list(second.modify_tensors(scales, name, bid))
            except Exception:  # it takes a tensor apart by the number of its columns
                return [], []

        def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
            if new_name in self._blocks:
                return gguf.GGMLQuantizationType[self._blocks[new_name][0]]
            if new_name in found.rounded:
                return gguf.GGMLQuantizationType.Q8_0
            return super().tensor_force_quant(name, new_name, bid, n_dims)

        def prepare_metadata(self, vocab_only: bool) -> None:
            if layers.schemes:
                self.ftype = gguf.LlamaFileType.MOSTLY_Q8_0
            super().prepare_metadata(vocab_only)

        def _add_tensor(self, name: str, tensor: Any, *args: Any, **options: Any) -> None:
            if name in self._blocks:
                kind, *made = self._blocks.pop(name)
                integers = made[0]
                shape = (*integers.shape[:-1], row_bytes(kind, integers.shape[-1]))
                meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape("uint8", shape)
                packed = partial(_packed, kind, found)
                tensor = gguf.LazyNumpyTensor(meta=meta, args=tuple(each.numpy() for each in made), func=packed)
            self._add(name, tensor, *args, **options)

    ftype = gguf.LlamaFileType[_STORED.get(float_dtype(layers.source, layers.schemes) or "", "MOSTLY_BF16")]
    return Converter(folder, ftype, file, hparams=hparams)


def _alike(values: Any, integers: Any, scales: Any) -> bool:
    return integers.shape == values.shape and scales.shape[:-1] == values.shape[:-1]


def _packed(kind: str, found: Found, integers: np.ndarray, scales: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The blocks. Raises ValueError where the converter has computed with the values, not only moved them."""
    import numpy as np

    width = integers.shape[-1] // scales.shape[-1]
    for row, its, expected in zip(
        *(each.reshape(-1, each.shape[-1]) for each in (integers, scales, values)), strict=True
    ):
        if not np.allclose(row * np.repeat(its, width), expected, rtol=1e-6, atol=0):
            raise ValueError("it changes the numbers of a quantized layer")
    packed = pack(kind, integers, scales)
    found.integers += integers.size
    found.scale_rounding = max(found.scale_rounding, packed.scale_rounding)
    return packed.blocks


def _warnings(layers: Layers, found: Found) -> list[str]:
    warnings = []
    if any(scheme.is_static for scheme in layers.schemes.values()):
        warnings.append("llama.cpp finds the scales of activations itself: those from calibration are left out")
    if found.rounded:
        more = f" and {len(found.rounded) - 3} more" if len(found.rounded) > 3 else ""
        warnings.append(f"{', '.join(found.rounded[:3])}{more}: rounded anew, since llama.cpp cuts them in another way")
    return warnings
