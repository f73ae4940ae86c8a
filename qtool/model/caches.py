"""Where a decoder layer hands its keys and values to the cache, and what happens to them there.

transformers' attention gives them, after the rotary embedding, to a cache's `update`, and computes with what that gives
back. So whatever stands in the cache's place sees what a runtime keeps, and can put there what is left of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from qtool.errors import InputError

Keeping = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""What becomes of keys and values, each [samples, heads, length, width]."""

_CACHE = ("past_key_values", "layer_past")  # what attention calls the cache, in the models of transformers 5.19
_KEY, _VALUE = "k_proj", "v_proj"


def attention(layer: nn.Module) -> str | None:
    """The name inside a layer of the module that fills the cache; None where none or several do.

    It has a linear for keys and one for values: caches of other kinds (DeepSeek's latents, states) hold no keys.
    """
    found = [
        name
        for name, module in layer.named_modules()
        if name and hasattr(module, _KEY) and hasattr(module, _VALUE) and _cache_argument(module)
    ]
    return found[0] if len(found) == 1 else None


def value_linear(attention: str) -> str:
    """The linear whose output the values are."""
    return f"{attention}.{_VALUE}"


@contextmanager
def kept(layer: nn.Module, keeping: Mapping[str, Keeping]) -> Iterator[None]:
    """Within the block this becomes of keys and values, by the names of attention modules inside the layer."""
    with ExitStack() as stack:
        for name, keep in keeping.items():
            module = layer.get_submodule(name)
            hook = module.register_forward_pre_hook(_with_cache(module, _Cache(keep)), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def refuse(layer: str, where: str) -> InputError:
    """About a layer whose keys and values nobody sees."""
    return InputError(
        f"{layer} hands no keys and values to a cache that qtool knows, so they can't be quantized",
        where=where,
        hint="leave out --kv-cache, or kv_cache in the recipe",
    )


class _Cache:
    """Stands in for transformers' cache before the first token."""

    def __init__(self, keep: Keeping) -> None:
        self._keep = keep

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._keep(keys, values)

    def get_seq_length(self, *_: Any) -> int:
        return 0


def _cache_argument(module: nn.Module) -> str | None:
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in _CACHE if name in parameters), None)


def _with_cache(module: nn.Module, cache: _Cache) -> Callable[..., Any]:
    signature, argument = inspect.signature(type(module).forward), _cache_argument(module)
    assert argument is not None

    def change(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = signature.bind_partial(module, *args, **kwargs)
        bound.arguments[argument] = cache
        return bound.args[1:], bound.kwargs

    return change
