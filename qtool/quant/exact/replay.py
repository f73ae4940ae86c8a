"""Running a decoder layer again from the middle: what precedes a group of linears is not computed twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from qtool.quant.product import INT8, QuantizedWeight, per_token_product


class Recording:
    """One forward pass of a layer, kept so that it can be repeated from any of its linears on.

    Args:
        layer: the decoder layer.
        run: calls it, always with the same input, and returns its output tensor.

    Attributes:
        output: the layer's output.
    """

    def __init__(self, layer: nn.Module, run: Callable[[], torch.Tensor]) -> None:
        self.layer, self.run = layer, run
        self.modules = {name: module for name, module in layer.named_modules() if name}
        self.outputs: dict[str, Any] = {}  # in the order in which the modules finish
        self.inputs: dict[str, torch.Tensor] = {}  # of the linears, in the order in which they start

        def enter(name: str, args: tuple[Any, ...]) -> None:
            if isinstance(self.modules[name], nn.Linear):
                self.inputs[name] = args[0]

        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(lambda _m, args, name=name: enter(name, args)).remove)
                stack.callback(
                    module.register_forward_hook(
                        lambda _m, _a, out, name=name: self.outputs.__setitem__(name, out)
                    ).remove
                )
            self.output = run()


class Replay:
    """A recorded pass, repeated with other outputs of one group's linears.

    Args:
        recording: of the whole layer.
        linears: names of the linears of the group, in call order.

    Attributes:
        x: the group's input.
        output: the layer's output as recorded.
        later: names of the linears that run after the group.
    """

    def __init__(self, recording: Recording, linears: Sequence[str]) -> None:
        order, finished = list(recording.inputs), list(recording.outputs)
        start = order.index(linears[0])
        self.x, self.output = recording.inputs[linears[0]], recording.output
        self.later = tuple(name for name in order[start + 1 :] if name not in linears)
        self._recording = recording
        self._fixed = finished[: finished.index(linears[0])]
        self._passing = _modules_passing(linears, recording)

    def __call__(
        self, results: Mapping[str, torch.Tensor], coarse: Mapping[str, QuantizedWeight] | None = None
    ) -> torch.Tensor:
        """The layer's output if the group's linears gave `results`.

        Args:
            results: name → tensor shaped like the original.
            coarse: weights of the later linears in int8. With it such a linear gives its recorded output plus the
                int8 product of the weight and what has changed in its input, so that the rounding error is
                relative to the change, not to the value.
        """
        layer, outputs = self._recording.layer, self._recording.outputs
        results = {name: result.view_as(outputs[name]) for name, result in results.items()}
        with ExitStack() as stack:
            for name in self._fixed:
                _return(stack, layer.get_submodule(name), outputs[name])
            for name, result in results.items():
                _return(stack, layer.get_submodule(name), result)
            for name, linear in self._passing.items():
                replaced = _replace(outputs[name], outputs[linear], results[linear])
                _return(stack, layer.get_submodule(name), replaced)
            for name, weight in (coarse or {}).items():
                moved = partial(_moved, self._recording.inputs[name], outputs[name], weight)
                _set_forward(stack, layer.get_submodule(name), moved)
            return self._recording.run()


def _modules_passing(linears: Sequence[str], recording: Recording) -> dict[str, str]:
    """Modules around a linear that hand its output on unchanged (attention around o, the MLP around down)."""
    passing = {}
    for linear in linears:
        for name in recording.modules:
            out = recording.outputs.get(name)
            first = out[0] if isinstance(out, tuple) else out
            if linear.startswith(name + ".") and first is recording.outputs[linear]:
                passing[name] = linear
    return passing


def _moved(x: torch.Tensor, y: torch.Tensor, weight: QuantizedWeight, moved_x: torch.Tensor) -> torch.Tensor:
    """y, the output of a linear for x, carried over to another input."""
    change = (moved_x - x).reshape(-1, x.shape[-1])
    return per_token_product(change, weight, INT8).view_as(y).add_(y)


def _replace(out: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(out, tuple):
        return tuple(new if item is old else item for item in out)
    return new


def _return(stack: ExitStack, module: nn.Module, out: Any) -> None:
    _set_forward(stack, module, lambda *_a, **_k: out)


def _set_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    own = module.__dict__.get("forward")
    module.forward = forward

    def restore() -> None:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own

    stack.callback(restore)
