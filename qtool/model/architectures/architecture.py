"""Where the parts of a decoder are in transformers' own model, found by their structure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from qtool.errors import InputError


@dataclass(frozen=True)
class FusedExperts:
    """All routed experts of a layer in one module, as transformers 5 has them.

    Attributes:
        name: of the module inside the decoder layer.
        gate_up, down: its parameters; a checkpoint's tensors are found by these names.
        count: how many experts.
        hidden, intermediate: their widths.
        apply_gate: [tokens, gate and up] -> [tokens, intermediate].
        router: the parameter [count, hidden] that scores the experts, by its name inside the decoder layer, if any.
    """

    name: str
    gate_up: str
    down: str
    count: int
    hidden: int
    intermediate: int
    apply_gate: Callable[..., Any]
    router: str | None


class Architecture:
    """What fits most decoders. A family for which an answer is another overrides it.

    Attributes:
        model_types: the values of config.json's model_type that a subclass is for.
        float_linears: regular expressions for linears inside a decoder layer that runtimes keep float, and why.
        heads, experts_per_token: settings of config.json.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    float_linears: ClassVar[dict[str, str]] = {}
    heads: ClassVar[str] = "num_attention_heads"
    experts_per_token: ClassVar[str] = "num_experts_per_tok"

    def layers(self, decoder: nn.Module, config: Any) -> str | None:
        """The name inside the model of text of its list of decoder layers; None for a model without.

        Args:
            config: transformers', of the model of text. A list as long as its number of layers says goes first, else
                the one with the most parameters.
        """
        depth = getattr(config, "num_hidden_layers", None)
        lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
        outermost = {
            name: module
            for name, module in lists.items()
            if not any(name.startswith(f"{other}.") for other in lists) and len(module)
        }
        fitting = {name: module for name, module in outermost.items() if len(module) == depth} or outermost
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in fitting.items()}
        return max(sizes, key=lambda name: sizes[name], default=None)

    def experts(self, layer: nn.Module, layer_name: str, where: str) -> Iterator[FusedExperts]:
        """The routed experts of a decoder layer: gated linears without biases, as DeepSeek's are.

        Raises InputError, about the model at `where`, for experts of another kind.
        """
        for name, module in layer.named_modules():
            if {part: p.dim() for part, p in module.named_parameters(recurse=False)}.get("down_proj") != 3:
                continue
            _refuse_unusual(module, f"{layer_name}.{name}", where)
            count, hidden, intermediate = module.get_parameter("down_proj").shape
            yield FusedExperts(
                name=name,
                gate_up="gate_up_proj",
                down="down_proj",
                count=count,
                hidden=hidden,
                intermediate=intermediate,
                apply_gate=module._apply_gate,
                router=self.router(layer, name, count, hidden),
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


def _refuse_unusual(module: Any, name: str, where: str) -> None:
    usual = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    unusual = [key for key, value in usual.items() if getattr(module, key, value) != value]
    if unusual or not hasattr(module, "_apply_gate"):
        raise InputError(
            f"the experts of {name} are of a kind that qtool doesn't read ({', '.join(unusual) or 'no gate'})",
            where=where,
            hint="it reads experts of three linears: gate, up, down",
        )
