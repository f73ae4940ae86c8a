"""A decoder model run one layer at a time, with at most one layer's weights in memory, and of its experts one.

A quantized checkpoint runs as its runtimes would, in float: weights are dequantized as a layer is loaded, and
what enters a quantized linear goes through the integers of its static or per-token scale. So do keys and values, where
the checkpoint says how they are kept.

What the layers are called with (masks, rotary embeddings, whatever the architecture hands down) comes from the model's
own forward, which runs around them: see `model.loop`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError, foreign
from qtool.model import caches, experts, pictures
from qtool.model.architectures import Architecture
from qtool.model.experts import RoutedExperts
from qtool.model.head import Head
from qtool.model.loader import Loader, Quantizer
from qtool.model.loop import DecoderLoop
from qtool.model.skeleton import Skeleton
from qtool.model.state import Batch
from qtool.model.weights import ModelWeights
from qtool.quant.cache import CacheQuantizer
from qtool.quant.topology import linear_layers

_TOKENS = 8192  # that go through the prologue at a time


class DecoderStream:
    """Runs a checkpoint's decoder layers one by one.

    Args:
        checkpoint: an opened checkpoint, float or in one of qtool's quantized formats.
        dtype: compute type of weights and hidden states, unless the family's own code runs in float32 alone.
        device: where the layers and experts run, their inputs' statistics are, and weights are searched and rounded.
            Hidden states, routing and groups come to main memory at once.
        trust_remote_code: allow the checkpoint's own modelling code.
        weights: what all weights are read through; None for the checkpoint as it is.

    Raises:
        InputError: transformers doesn't know the architecture, it is no decoder with a list of layers, or the
            checkpoint lacks experts.

    Attributes:
        checkpoint, device: as given.
        dtype: to compute in.
        weights: what all weights are read through.
        head: what comes after the layers, and the output projection.
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
        self.device = torch.device(device)
        self.weights: ModelWeights = FloatReader(checkpoint, self.device) if weights is None else weights
        self._skeleton = Skeleton(checkpoint, dtype, self.device, trust_remote_code=trust_remote_code)
        if self._skeleton.architecture.only_float32 and dtype != torch.float32:
            dtype = torch.float32
            self._skeleton = Skeleton(checkpoint, dtype, self.device, trust_remote_code=trust_remote_code)
        self.dtype = dtype
        self._loader = Loader(self._skeleton, self.weights, dtype, self.device)
        self._loop = DecoderLoop(self._skeleton, self._loader)
        self.head = Head(self._skeleton, self._loader, self._loop)
        self.weights = self._loader.weights = experts.split(self._skeleton, self._loader)
        experts.take_out(self._skeleton, self._loader)
        self._calling = dtype  # the type of what the layers are called with

    # ------------------------------------------------------------------ what the model is

    @property
    def depth(self) -> int:
        return len(self._skeleton.layers)

    @property
    def hidden_size(self) -> int:
        return int(self._skeleton.config.hidden_size)

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
        for name, stored in self.own_parameters(index).items():
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

    def unused_experts(self, index: int) -> list[RoutedExperts]:
        """Further experts of a layer, to which no text goes (Ernie-VL's for pictures)."""
        return [module for module in self.skeleton_layer(index).modules() if isinstance(module, RoutedExperts)][1:]

    def linears(self) -> list[str]:
        """The linears of all decoder layers and their experts, by the checkpoint's names without ".weight"."""
        found: list[str] = []
        for index in range(self.depth):
            if self.is_idle(index):
                continue
            found += self.layer_linears(index).values()
            routed = self.routed(index)
            if routed is not None:
                found += [linear for expert in routed.names for linear in expert]
        return found

    def layer_linears(self, index: int) -> dict[str, str]:
        """The linears of a layer, without experts, that the checkpoint holds as they are, and no layer before has.

        Returns:
            The checkpoint's names without ".weight", by their names inside the layer.
        """
        own, linears = self.own_parameters(index), linear_layers(self.skeleton_layer(index))
        weights = {name: own[f"{name}.weight"] for name in linears if f"{name}.weight" in own}
        return {name: stored.removesuffix(".weight") for name, stored in weights.items() if stored.endswith(".weight")}

    def own_parameters(self, index: int) -> dict[str, str]:
        """The parameters of a layer that the checkpoint holds as they are, and no layer before has.

        Returns:
            The checkpoint's names, by their names inside the layer.
        """
        found, prefix = {}, f"{self._skeleton.layers_name}.{index}."
        for name, parameter in self.skeleton_layer(index).named_parameters():
            stored = self.stored(index, name)
            if self._loader.names.modules.get(stored) == prefix + name:
                self._loader.check(stored, parameter.shape)
                found[name] = stored
        return found

    def attention(self, index: int) -> tuple[str, str] | None:
        """The module of a layer that fills the cache with keys and values: its name inside the layer, and in the
        checkpoint. None where there is none, or text doesn't go through it."""
        name = None if self.is_idle(index) else caches.attention(self.skeleton_layer(index))
        if name is None:
            return None
        value = f"{caches.value_linear(name)}.weight"
        owner, _, _ = self.stored(index, value).removesuffix(".weight").rpartition(".")
        return name, owner

    def shared_parameters(self, index: int) -> set[str]:
        """The parameters of a layer that other layers have as well, by their names inside the layer."""
        prefix = f"{self._skeleton.layers_name}.{index}."
        names = (name for name, _ in self.skeleton_layer(index).named_parameters())
        return {name for name in names if self._loader.names.is_tied(prefix + name)}

    # ------------------------------------------------------------------ running it

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer with its weights loaded; they are gone when the block ends."""
        layer = self.skeleton_layer(index)
        with self.weights.together():
            state, quantizers = self._load(index)
        layer.load_state_dict(state, strict=True, assign=True)
        state.clear()  # or a change of the layer's type would leave the old tensors in memory
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(lambda _m, args, quantize=quantize: quantize(args[0]))
            for name, quantize in quantizers.items()
        ]
        try:
            with caches.kept(layer, self._caches(index)):
                yield layer.requires_grad_(False)
        finally:
            for hook in hooks:
                hook.remove()
            for module in layer.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        empty = torch.empty(parameter.shape, dtype=self.dtype, device="meta")
                        module._parameters[name] = nn.Parameter(empty, requires_grad=False)

    @torch.no_grad()
    def prologue(self, ids: torch.Tensor) -> Batch:
        """What enters the first decoder layer, for token ids [samples, length].

        Raises InputError for a model whose layers can't be run one by one.
        """
        step = max(1, _TOKENS // ids.shape[1])
        parts = (self._loop.entering(part, self._calling) for part in ids.split(step))
        return Batch(ids, tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def run(self, index: int, layer: nn.Module, batch: Batch) -> Batch:
        """One decoder layer on what the one before it left."""
        if self._loop.is_idle(index):
            return batch
        call = self._loop.call(index, batch, self._calling)
        hint = "its code does what qtool can't follow, and this model can't be quantized layer by layer"
        with foreign(f"{self.layer_name(index)} can't be run", where=str(self.checkpoint.path), hint=hint):
            left = layer(*call.args, **call.kwargs)
        return Batch(batch.ids, self._loop.left(index, call, left), batch.numbers)

    def show(self, inputs: Sequence[Mapping[str, torch.Tensor]], length: int) -> None:
        """Calibrate on these samples, which have pictures, from now on.

        Args:
            inputs: what the model's processor made of each sample, of `length` tokens or more.

        Raises InputError as `pictures.calls`.
        """
        self._loop.show(pictures.calls(self._skeleton, self._loader, inputs, length))

    @property
    def is_shown(self) -> bool:
        """It calibrates on samples with pictures, which go through a layer one at a time."""
        return self._loop.is_shown

    @property
    def is_plain(self) -> bool:
        """Hidden states are all that passes from layer to layer, and nothing else depends on the tokens."""
        return self._loop.is_plain

    def unusual(self, sign: str) -> InputError:
        """About a model whose layers can't be run as they are wanted to; `sign` is why."""
        return self._skeleton.unusual(sign)

    def is_idle(self, index: int) -> bool:
        """Whether text doesn't go through this layer (as with cross-attention to pictures)."""
        return self._loop.is_idle(index)

    def is_called(self, index: int, linear: str) -> bool:
        """Whether text goes through a linear of a layer, by its name inside it."""
        return self._loop.is_called(index, linear)

    def entering(self, index: int, length: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """(shape without the samples, type) of each tensor that enters layer `index`, for samples of this length.

        `depth` as the index tells what leaves the last layer.
        """
        return self._loop.sample_shapes(index, length)

    @contextmanager
    def precision(self, dtype: torch.dtype) -> Iterator[None]:
        """Within the block, `run` takes a layer and states of this type."""
        saved, self._calling = self._calling, dtype
        try:
            yield
        finally:
            self._calling = saved

    def _caches(self, index: int) -> dict[str, caches.Keeping]:
        """What keys and values go through, where the checkpoint says how they are kept."""
        found = self.attention(index)
        cache = None if found is None else self.weights.cache(found[1])
        return {} if found is None or cache is None else {found[0]: CacheQuantizer(cache)}

    def _load(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Quantizer]]:
        """(a layer's parameters, what the input of its quantized linears goes through), by their names inside it."""
        state, quantizers = dict[str, torch.Tensor](), dict[str, Quantizer]()
        for name, parameter in self.skeleton_layer(index).state_dict().items():
            owner, _, part = name.rpartition(".")
            stored = self.stored(index, name)
            if part != "weight" or stored not in self._loader.weights:
                state[name] = self._loader.parameter(f"{self._skeleton.layers_name}.{index}.{name}", parameter.shape)
                continue
            state[name], quantize = self._loader.linear(stored.removesuffix(".weight"), parameter.shape)
            if quantize is not None:
                quantizers[owner] = quantize
        return state, quantizers
