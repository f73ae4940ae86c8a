"""How the layers of a model that is being written are quantized."""

from __future__ import annotations

import dataclasses
from typing import Any

from qtool.checkpoint.formats.fused import fused_name
from qtool.errors import QtoolError
from qtool.scheme import PRESETS, QuantizationArgs, Scheme, name_of

Inputs = tuple[float | None, int | None]
"""Scale and zero point of a static layer's input; None for others."""


class Linears:
    """Every linear layer so far, by its name without ".weight".

    Attributes:
        schemes: None for a float layer.
    """

    def __init__(self) -> None:
        self.schemes: dict[str, Scheme | None] = {}
        self._inputs: dict[str, Inputs] = {}  # of layers that are fused, by what they are fused to
        self._new: dict[str, list[Any]] = {}

    def add(self, name: str, scheme: Scheme | None, inputs: Inputs = (None, None)) -> None:
        """Raises QtoolError when runtimes fuse this layer with one that has other `inputs`."""
        self.schemes[name] = scheme
        self._new[name] = [_as_json(scheme), *inputs]
        fused = fused_name(name)
        if scheme is None or not fused:
            return
        if self._inputs.setdefault(fused, inputs) != inputs:
            raise QtoolError(
                f"input scale and zero point {inputs} differ from {self._inputs[fused]} of its siblings; "
                "runtimes load one of them for all",
                where=name,
            )

    def state(self) -> dict[str, list[Any]]:
        """What was added since the last call, for `restore`."""
        new, self._new = self._new, {}
        return new

    def restore(self, state: dict[str, list[Any]]) -> None:
        """Add what a `state` says."""
        for name, (scheme, scale, zero_point) in state.items():
            self.add(name, _from_json(scheme), (scale, zero_point))
        self._new = {}


def _as_json(scheme: Scheme | None) -> Any:
    """The usual name where there is one: a model can have 100,000 layers."""
    return None if scheme is None else name_of(scheme) or dataclasses.asdict(scheme)


def _from_json(found: Any) -> Scheme | None:
    if found is None:
        return None
    if isinstance(found, str):
        return PRESETS[found]
    weights, activations = found["weights"], found["activations"]
    return Scheme(QuantizationArgs(**weights), QuantizationArgs(**activations) if activations else None)
