"""Samples with pictures: what the model of text is called with, once its towers have seen them.

The whole model runs up to the call of its model of text, with the towers' weights read when they are used. What it is
called with (embeddings, positions, masks, features for the first layers) is kept, cut to the samples' length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch

from qtool.errors import QtoolError, in_one_line
from qtool.model.loader import Loader
from qtool.model.outside import Outside
from qtool.model.skeleton import Skeleton
from qtool.model.structure import mapped, tensors_in
from qtool.model.textmodel import Call, Reached, replaced


@torch.no_grad()
def calls(skeleton: Skeleton, loader: Loader, inputs: Sequence[Mapping[str, torch.Tensor]], length: int) -> list[Call]:
    """The call of the model of text for each sample.

    Args:
        inputs: of one sample each, as the model's processor gives them, with `length` tokens or more.

    Raises InputError for a model whose own code doesn't take them, or whose towers lack tensors.
    """
    _fill_buffers(skeleton, loader)
    outside = Outside(skeleton, loader, loader.dtype)

    def reached(*args: Any, **kwargs: Any) -> NoReturn:
        raise Reached(Call(args, kwargs))

    found = []
    for each in inputs:
        try:
            with replaced({skeleton.decoder: reached}), outside:
                skeleton.model(**_on_device(each, loader), use_cache=False)
        except Reached as call:
            found.append(_cut(call.call, each["input_ids"].shape[1], length))
        except QtoolError:
            raise
        except Exception as error:  # the model's own code
            raise skeleton.unusual(f"its own code fails on a picture ({in_one_line(error)})") from error
        else:
            raise skeleton.unusual("it doesn't call its model of text for a picture")
    return found


def _on_device(inputs: Mapping[str, torch.Tensor], loader: Loader) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(loader.device, loader.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def _fill_buffers(skeleton: Skeleton, loader: Loader) -> None:
    """Those of the towers: from the checkpoint where it has them, else as transformers makes them."""
    skeleton.fill_all_buffers(loader.device)
    own = {id(module) for module in skeleton.decoder.modules()}
    for name, module in skeleton.model.named_modules():
        for part, buffer in module._buffers.items():
            full = f"{name}.{part}"
            if buffer is not None and id(module) not in own and full in skeleton.tensors:
                module._buffers[part] = loader.parameter(full, tuple(buffer.shape))


def _cut(call: Call, length: int, wanted: int) -> Call:
    """The call for the first tokens of a sample: whatever has a number for each token has fewer."""
    if length == wanted:
        return call
    pictures = next(_places(call, length), None)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        for dimension, size in enumerate(tensor.shape):
            if size == length:
                tensor = tensor.narrow(dimension, 0, wanted)
        if pictures is not None and tensor.dim() == 2 and len(tensor) == int(pictures.sum()):
            return tensor[: int(pictures[:, :wanted].sum())]  # what the first layers add where a picture is
        return tensor

    return Call(mapped(call.args, cut), mapped(call.kwargs, cut))


def _places(call: Call, length: int) -> Iterator[torch.Tensor]:
    """Masks [1, length] of a call that say where pictures are."""
    for tensor in tensors_in([*call.values.values()]):
        if tensor.dtype == torch.bool and tuple(tensor.shape) == (1, length):
            yield tensor
