"""Running a decoder layer again from the middle: what precedes a group of linears is not computed twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn


class Recording:
    """One forward pass of a layer, kept so that it can be repeated with other outputs of some linears.

    Args:
        layer: the decoder layer.
        run: calls it, always with the same input, and returns its output tensor.
        linears: names of the linears of one group, in call order.

    Attributes:
        x: the group's input.
        output: the layer's output.
    """

    def __init__(self, layer: nn.Module, run: Callable[[], torch.Tensor], linears: Sequence[str]) -> None:
        self._layer, self._run, self._linears = layer, run, tuple(linears)
        modules = {name: module for name, module in layer.named_modules() if name}
        outputs: dict[str, Any] = {}
        finished_before: dict[str, Any] = {}
        started = False
        inputs: list[torch.Tensor] = []

        def enter(name: str, args: tuple[Any, ...]) -> None:
            nonlocal started
            if name == self._linears[0] and not started:
                started = True
                inputs.append(args[0])
                finished_before.update(outputs)

        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_pre_hook(lambda _m, args, name=name: enter(name, args)).remove)
                stack.callback(
                    module.register_forward_hook(lambda _m, _a, out, name=name: outputs.__setitem__(name, out)).remove
                )
            self.output = run()
        self.x = inputs[0]
        self._fixed = finished_before
        self._outputs = {name: outputs[name] for name in self._linears}
        self._passing = _modules_passing(self._outputs, outputs, modules)

    def replay(self, results: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The layer's output if the group's linears gave `results` (name → tensor shaped like the original)."""
        with ExitStack() as stack:
            for name, out in self._fixed.items():
                _patch(stack, self._layer.get_submodule(name), out)
            for name in self._linears:
                _patch(stack, self._layer.get_submodule(name), results[name].view_as(self._outputs[name]))
            for name, (linear, out) in self._passing.items():
                replaced = _replace(out, self._outputs[linear], results[linear].view_as(self._outputs[linear]))
                _patch(stack, self._layer.get_submodule(name), replaced)
            return self._run()


def _modules_passing(
    linear_outputs: Mapping[str, torch.Tensor], outputs: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[str, Any]]:
    """Modules around a linear that hand its output on unchanged (attention around o, the MLP around down)."""
    passing = {}
    for linear, y in linear_outputs.items():
        for name in modules:
            out = outputs.get(name)
            first = out[0] if isinstance(out, tuple) else out
            if linear.startswith(name + ".") and first is y:
                passing[name] = (linear, out)
    return passing


def _replace(out: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(out, tuple):
        return tuple(new if item is old else item for item in out)
    return new


def _patch(stack: ExitStack, module: nn.Module, out: Any) -> None:
    own = module.__dict__.get("forward")
    module.forward = lambda *_a, **_k: out

    def restore() -> None:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own

    stack.callback(restore)
