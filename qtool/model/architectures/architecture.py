"""Where the parts of a decoder are in transformers' own model, found by their structure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from qtool.errors import InputError


@dataclass(frozen=True)
class FusedExperts:
    """All routed experts of a layer in one module, as transformers 5 has them.

    Attributes:
        name: of the module inside the decoder layer.
        gate_up, down: its parameters; a checkpoint's tensors are found by these names.
        count: how many experts.
        hidden, intermediate: their widths.
        apply_gate: [tokens, gate and up] -> [tokens, intermediate]; without a gate the activation, of up alone.
        router: the parameter [count, hidden] that scores the experts, by its name inside the decoder layer, if any.
        has_gate, has_bias: whether each has a gate beside up, and its linears biases.
        transposed: the parameters are [experts, in, out].
        interleaved: rows of gate and up take turns.
        has_identities: experts with numbers from `count` on give what they get.
    """

    name: str
    gate_up: str
    down: str
    count: int
    hidden: int
    intermediate: int
    apply_gate: Callable[..., Any]
    router: str | None
    has_gate: bool = True
    has_bias: bool = False
    transposed: bool = False
    interleaved: bool = False
    has_identities: bool = False


@dataclass(frozen=True)
class Interleaved:
    """Hands gate and up, one after the other, to a function that takes them in turn."""

    apply_gate: Callable[..., Any]

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: torch.Tensor = self.apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))
        return result


class Architecture:
    """What fits most decoders. A family for which an answer is another overrides it.

    Attributes:
        model_types: the values of config.json's model_type that a subclass is for.
        float_linears: regular expressions for linears inside a decoder layer that runtimes keep float, and why.
        heads, experts_per_token: settings of config.json.
        only_float32: the family's own code runs in no other type.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    float_linears: ClassVar[dict[str, str]] = {}
    heads: ClassVar[str] = "num_attention_heads"
    experts_per_token: ClassVar[str] = "num_experts_per_tok"
    only_float32: ClassVar[bool] = False

    def layers(self, decoder: nn.Module, config: Any) -> str | None:
        """The name inside the model of text of its list of decoder layers; None for a model without.

        Args:
            config: transformers', of the model of text. A list as long as its number of layers says goes first, else
                the one with the most parameters; those of models inside it (a tower for pictures) come last.
        """
        depth = getattr(config, "num_hidden_layers", None)
        lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
        outermost = {
            name: module
            for name, module in lists.items()
            if not any(name.startswith(f"{other}.") for other in lists) and len(module)
        }
        towers = tuple(f"{name}." for name, module in decoder.named_modules() if name and hasattr(module, "base_model"))
        own = {name: module for name, module in outermost.items() if not name.startswith(towers)} or outermost
        fitting = {name: module for name, module in own.items() if len(module) == depth} or own
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in fitting.items()}
        return max(sizes, key=lambda name: sizes[name], default=None)

    def experts(self, layer: nn.Module, layer_name: str, where: str) -> Iterator[FusedExperts]:
        """The routed experts of a decoder layer: those that transformers runs through its experts' interface.

        Raises InputError, about the model at `where`, for experts of another kind.
        """
        for name, module in layer.named_modules():
            parts = {part: p for part, p in module.named_parameters(recurse=False) if p.dim() == 3}
            if not {"gate_up_proj", "up_proj"} & parts.keys() or "down_proj" not in parts:
                if parts and not isinstance(module, _ConvNd) and "expert" in f"{name}{type(module).__name__}".lower():
                    raise _unusual(f"{layer_name}.{name}", where)
                continue
            if "gate_proj" in parts and not hasattr(module, "has_gate"):
                continue  # Inkling's shared experts: no router, and matrices that no runtime reads as integers
            yield self.fused(layer, name, module, f"{layer_name}.{name}", where)

    def fused(self, layer: nn.Module, name: str, module: Any, full_name: str, where: str) -> FusedExperts:
        """One module of experts. Raises InputError as `experts`."""
        has_gate = getattr(module, "has_gate", True if hasattr(module, "_apply_gate") else None)
        transposed = getattr(module, "is_transposed", False)
        if has_gate is None or (has_gate and not hasattr(module, "_apply_gate")):
            raise _unusual(full_name, where)
        interleaved = not getattr(module, "is_concatenated", True)
        shape = module.get_parameter("down_proj").shape
        count, hidden, intermediate = (shape[0], shape[2], shape[1]) if transposed else shape
        apply_gate = module._apply_gate if has_gate else module.act_fn
        return FusedExperts(
            name=name,
            gate_up="gate_up_proj" if has_gate else "up_proj",
            down="down_proj",
            count=count,
            hidden=hidden,
            intermediate=intermediate,
            apply_gate=Interleaved(apply_gate) if interleaved else apply_gate,
            router=self.router(layer, name, count, hidden),
            has_gate=has_gate,
            has_bias=getattr(module, "has_bias", False),
            transposed=transposed,
            interleaved=interleaved,
        )

    def kept_float(self, linear: str) -> str | None:
        """Why runtimes keep a linear float, by its name inside the decoder layer; None where they don't."""
        return next((why for pattern, why in self.float_linears.items() if re.fullmatch(pattern, linear)), None)

    def router(self, layer: nn.Module, experts: str, count: int, hidden: int) -> str | None:
        """The parameter [count, hidden] of a module beside the experts, by its name inside the layer."""
        parent = experts.rpartition(".")[0]
        for name, parameter in layer.get_submodule(parent).named_parameters():
            if tuple(parameter.shape) == (count, hidden) and name.count(".") == 1:
                return f"{parent}.{name}" if parent else name
        return None


def _unusual(name: str, where: str) -> InputError:
    return InputError(
        f"the experts of {name} are of a kind that qtool doesn't read",
        where=where,
        hint="it reads experts that are a gate, up and down, or up and down, of one module",
    )
