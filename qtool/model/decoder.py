"""A decoder model run one layer at a time, with at most one layer's weights in memory, and of its experts one.

A quantized checkpoint runs as its runtimes would, in float: weights are dequantized as a layer is loaded, and
what enters a quantized linear goes through the integers of its static or per-token scale.

The skeleton's forward runs once per batch shape with every decoder layer replaced by a listener, which tells what the
layers are called with (masks, rotary embeddings, whatever the architecture hands down); after that the layers run by
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.model import experts
from qtool.model.architectures import Architecture
from qtool.model.experts import RoutedExperts
from qtool.model.head import Head
from qtool.model.loader import Loader, Quantizer
from qtool.model.skeleton import Skeleton
from qtool.model.weights import ModelWeights
from qtool.quant.topology import linear_layers


class DecoderStream:
    """Runs a checkpoint's decoder layers one by one.

    Args:
        checkpoint: an opened checkpoint, float or in one of qtool's quantized formats.
        dtype: compute type of weights and hidden states.
        device: where the layers and experts run, their inputs' statistics are, and weights are searched and rounded.
            Hidden states, routing and groups come to main memory at once.
        trust_remote_code: allow the checkpoint's own modelling code.
        weights: what all weights are read through; None for the checkpoint as it is.

    Raises:
        InputError: transformers doesn't know the architecture, it is no decoder with a list of layers, or the
            checkpoint lacks experts.

    Attributes:
        checkpoint, dtype, device: as given.
        weights: what all weights are read through.
        head: the final norm and the output projection.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        trust_remote_code: bool = False,
        weights: ModelWeights | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.weights: ModelWeights = FloatReader(checkpoint, self.device) if weights is None else weights
        self._skeleton = Skeleton(checkpoint, dtype, self.device, trust_remote_code=trust_remote_code)
        self._loader = Loader(self._skeleton, self.weights, dtype, self.device)
        self.head = Head(self._skeleton, self._loader)
        experts.take_out(self._skeleton, self._loader)
        self._arguments: dict[int, list[dict[str, Any]]] = {}  # of the layers, by the length of hidden states

    # ------------------------------------------------------------------ what the model is

    @property
    def depth(self) -> int:
        return len(self._skeleton.layers)

    @property
    def hidden_size(self) -> int:
        return self._skeleton.embedding.get_parameter("weight").shape[1]

    @property
    def heads(self) -> int:
        """Attention heads, whose rows interleave in some fused projections."""
        return self._skeleton.heads

    @property
    def architecture(self) -> Architecture:
        """What is known of the family."""
        return self._skeleton.architecture

    @property
    def experts_per_token(self) -> int:
        """How many routed experts a token goes to."""
        return self._skeleton.experts_per_token

    def layer_name(self, index: int) -> str:
        """What the checkpoint calls a layer: its tensors' names begin with this and a dot."""
        for name, _ in self.skeleton_layer(index).named_parameters():
            stored = self.stored(index, name)
            if stored.endswith(f".{name}"):  # else the checkpoint renames this one inside the layer, too
                return stored.removesuffix(f".{name}")
        return f"{self._skeleton.layers_name}.{index}"

    def skeleton_layer(self, index: int) -> nn.Module:
        """The layer without weights (meta device), for planning."""
        return self._skeleton.layers[index]

    def stored(self, index: int, name: str) -> str:
        """The checkpoint's name of a layer's parameter, by its name inside the layer."""
        return self._loader.stored(f"{self._skeleton.layers_name}.{index}.{name}")

    def is_kept_in_float32(self, name: str) -> bool:
        """Whether the architecture wants this parameter or buffer in float32 whatever the rest is in."""
        return self._loader.is_kept_in_float32(name)

    def routed(self, index: int) -> RoutedExperts | None:
        """The routed experts of a layer; None where it has none."""
        return next(
            (module for module in self.skeleton_layer(index).modules() if isinstance(module, RoutedExperts)), None
        )

    def linears(self) -> list[str]:
        """The linears of all decoder layers and their experts, by the checkpoint's names without ".weight"."""
        found = []
        for index in range(self.depth):
            for name in linear_layers(self.skeleton_layer(index)):
                found.append(self.stored(index, f"{name}.weight").removesuffix(".weight"))
            routed = self.routed(index)
            if routed is not None:
                found += [linear for expert in routed.names for linear in expert]
        return found

    # ------------------------------------------------------------------ running it

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer with its weights loaded; they are gone when the block ends."""
        layer = self.skeleton_layer(index)
        state, quantizers = self._load(index)
        layer.load_state_dict(state, strict=True, assign=True)
        state.clear()  # or a change of the layer's type would leave the old tensors in memory
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(lambda _m, args, quantize=quantize: quantize(args[0]))
            for name, quantize in quantizers.items()
        ]
        try:
            yield layer.requires_grad_(False)
        finally:
            for hook in hooks:
                hook.remove()
            for module in layer.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        empty = torch.empty(parameter.shape, dtype=self.dtype, device="meta")
                        module._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings [batch, length, hidden] of ids [batch, length], reading only the rows in use."""
        unique, compact = torch.unique(ids, return_inverse=True)
        name = self._loader.stored(f"{self._skeleton.embedding_name}.weight")
        self._loader.check(name, self._skeleton.embedding.get_parameter("weight").shape)
        rows = self._loader.ready(self.weights.gather(name, unique))
        return torch.func.functional_call(self._skeleton.embedding, {"weight": rows}, (compact.to(self.device),))

    @torch.no_grad()
    def prologue(self, ids: torch.Tensor) -> torch.Tensor:
        """What enters the first decoder layer: [batch, length, hidden]; also learns the layers' other arguments.

        Raises InputError when that is more than the embeddings, or a multiple of them.
        """
        hidden = self.embed(ids)
        first, self._arguments[ids.shape[1]] = self._skeleton.layer_arguments(hidden[:1])
        if torch.equal(first, hidden[:1]):
            return hidden
        # Gemma and others scale the embeddings between table and first layer; the factor is one number.
        entering, own = first.cpu().double(), hidden[:1].cpu().double()
        factor = (entering * own).sum() / own.square().sum()
        if not torch.allclose(entering, own * factor, rtol=0.01, atol=0.01 * float(entering.abs().max())):
            raise self._skeleton.unusual("it adds something to the embeddings")
        return hidden * factor.to(hidden.dtype)

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """One decoder layer on hidden states [batch, length, hidden] of a length that `prologue` has seen."""
        output = layer(hidden, **self._arguments[hidden.shape[1]][index])
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def precision(self, dtype: torch.dtype, length: int) -> Iterator[None]:
        """Within the block, `run` takes hidden states of this dtype and length."""
        saved, self._arguments = self._arguments, {}
        try:
            few = torch.zeros(1, length, self.hidden_size, dtype=dtype, device=self.device)
            _, self._arguments[length] = self._skeleton.layer_arguments(few)
            yield
        finally:
            self._arguments = saved

    def _load(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Quantizer]]:
        """(a layer's parameters, what the input of its quantized linears goes through), by their names inside it."""
        state, quantizers = dict[str, torch.Tensor](), dict[str, Quantizer]()
        for name, parameter in self.skeleton_layer(index).state_dict().items():
            owner, _, part = name.rpartition(".")
            stored = self.stored(index, name)
            if part != "weight":
                state[name] = self._loader.tensor(stored, parameter.shape)
                continue
            state[name], quantize = self._loader.linear(stored.removesuffix(".weight"), parameter.shape)
            if quantize is not None:
                quantizers[owner] = quantize
        return state, quantizers
