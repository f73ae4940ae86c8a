"""A decoder model run one layer at a time, with at most one layer's weights in memory, and of its experts one.

A quantized checkpoint runs as its runtimes would, in float: weights are dequantized as a layer is loaded, and
what enters a quantized linear goes through the integers of its static or per-token scale.

The skeleton is transformers' own model class on the meta device. Its forward runs once per batch shape
with every decoder layer replaced by a recorder, which yields what the layers are called with (masks,
rotary embeddings, whatever the architecture hands down); after that the layers run by themselves.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError, in_one_line
from qtool.model import experts
from qtool.model.experts import Expert, RoutedExperts, Routing
from qtool.model.names import ExpertNames, Names
from qtool.model.weights import ModelWeights
from qtool.quant.integer import InputQuantizer
from qtool.quant.topology import linear_layers
from qtool.quant.types import QuantizedLinear


class DecoderStream:
    """Runs a checkpoint's decoder layers one by one.

    Args:
        checkpoint: an opened checkpoint, float or in one of qtool's quantized formats.
        dtype: compute type of weights and hidden states.
        device: where the layers and experts run. What is learnt from them (hidden states, routing, statistics, groups)
            comes to main memory at once, and weights are searched and rounded there.
        trust_remote_code: allow the checkpoint's own modelling code.
        weights: what all weights are read through; None for the checkpoint as it is.

    Raises:
        InputError: transformers doesn't know the architecture, or it is no decoder with a list of layers.
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
        self.weights: ModelWeights = FloatReader(checkpoint) if weights is None else weights
        self.dtype = dtype
        self.device = torch.device(device)
        self._model = _skeleton(checkpoint, dtype, trust_remote_code)
        self._base = self._model.base_model
        self._layers_name, self._layers = _decoder_layers(self._model, checkpoint)
        self._embedding: nn.Module = self._model.get_input_embeddings()
        self._embedding_name = self._name_of(self._embedding)
        if getattr(self._embedding, "padding_idx", None) is not None:
            self._embedding.padding_idx = None  # matters to gradients only, and `embed` renumbers the rows
        self._norm = self._final_norm()
        self._kept_in_float32 = getattr(self._model, "_keep_in_fp32_modules_strict", None) or ()
        self._take_out_experts()
        for module in self._base.modules():
            self._initialize_buffers(module)
        self._template_kwargs: dict[int, list[dict[str, Any]]] = {}

    @property
    def depth(self) -> int:
        return len(self._layers)

    def layer_name(self, index: int) -> str:
        return f"{self._layers_name}.{index}"

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer with its weights loaded; they are gone when the block ends."""
        layer = self._layers[index]
        prefix = self.layer_name(index) + "."
        state, hooks = {}, []
        for name, parameter in layer.state_dict().items():
            owner, _, part = name.rpartition(".")
            stored = self.stored_name(prefix + name)
            linear = self.weights.linear(stored.removesuffix(".weight")) if part == "weight" else None
            if linear is None:
                state[name] = self._load(stored, parameter.shape)
            else:
                state[name] = self._dequantized(stored, linear, parameter.shape)
                quantize = input_quantizer(linear)
                module = layer.get_submodule(owner)
                hooks.append(module.register_forward_pre_hook(lambda _m, args, quantize=quantize: quantize(args[0])))
        layer.load_state_dict(state, strict=True, assign=True)
        state.clear()  # or a change of the layer's type would leave the old tensors in memory
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

    @property
    def hidden_size(self) -> int:
        return self._embedding.get_parameter("weight").shape[1]

    @contextmanager
    def precision(self, dtype: torch.dtype, length: int) -> Iterator[None]:
        """Within the block, `run` takes hidden states of this dtype and length."""
        saved = self.dtype, self._template_kwargs
        self.dtype, self._template_kwargs = dtype, {}
        try:
            self._learn_arguments(torch.zeros(1, length, self.hidden_size, dtype=dtype, device=self.device))
            yield
        finally:
            self.dtype, self._template_kwargs = saved

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings [batch, length, hidden] of ids [batch, length], reading only the rows in use."""
        unique, compact = torch.unique(ids, return_inverse=True)
        name = f"{self._embedding_name}.weight"
        self._check_shape(name, self._embedding.get_parameter("weight").shape)
        rows = self.weights.gather(name, unique).to(device=self.device, dtype=self.dtype)
        return torch.func.functional_call(self._embedding, {"weight": rows}, (compact.to(self.device),))

    @torch.no_grad()
    def prologue(self, ids: torch.Tensor) -> torch.Tensor:
        """What enters the first decoder layer: [batch, length, hidden]; also learns the layers' other arguments.

        Raises InputError when that is more than the embeddings, or a multiple of them.
        """
        hidden = self.embed(ids)
        first = self._learn_arguments(hidden[:1])
        if torch.equal(first, hidden[:1]):
            return hidden
        # Gemma and others scale the embeddings between table and first layer; the factor is one number.
        entering, own = first.cpu().double(), hidden[:1].cpu().double()
        factor = (entering * own).sum() / own.square().sum()
        if not torch.allclose(entering, own * factor, rtol=0.01, atol=0.01 * float(entering.abs().max())):
            raise self._unusual("it adds something to the embeddings")
        return hidden * factor.to(hidden.dtype)

    def _learn_arguments(self, hidden: torch.Tensor) -> torch.Tensor:
        """Record what the model calls each layer with besides hidden states; returns those of the first layer."""
        first: list[torch.Tensor] = []
        kwargs: list[dict[str, Any]] = []

        class Recorder(nn.Module):
            def __init__(self, original: nn.Module) -> None:
                super().__init__()
                for name in ("attention_type", "layer_type", "is_sliding"):  # what base models look up on a layer
                    if hasattr(original, name):
                        setattr(self, name, getattr(original, name))

            def forward(self, hidden_states: torch.Tensor, **kw: Any) -> torch.Tensor:
                if not first:
                    first.append(hidden_states)
                kwargs.append(kw)
                return hidden_states

        parent_name, _, attribute = self._layers_name.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        setattr(parent, attribute, nn.ModuleList(Recorder(layer) for layer in self._layers))
        if self._norm is not None:
            self._norm.forward = lambda x, *_a, **_k: x  # its weights are not loaded
        try:
            self._base(inputs_embeds=hidden, use_cache=False)
        except RuntimeError as error:  # most likely it came upon a weight that is not loaded
            raise self._unusual(in_one_line(error)) from error
        finally:
            setattr(parent, attribute, self._layers)
            if self._norm is not None:
                del self._norm.__dict__["forward"]
        self._template_kwargs[hidden.shape[1]] = kwargs
        return first[0]

    def _unusual(self, sign: str) -> InputError:
        """About a model that is more than embeddings, layers and a norm; `sign` is how that showed."""
        known = [module for module in (self._embedding, self._norm, *self._layers) if module is not None]
        usual = {id(parameter) for module in known for parameter in module.parameters()}
        others = [name for name, parameter in self._base.named_parameters() if id(parameter) not in usual]
        return InputError(
            f"{type(self._model).__name__} has more around its decoder layers than qtool runs: "
            + (", ".join(others[:3]) or sign),
            where=str(self.checkpoint.path / "config.json"),
            hint="learned positions (OPT, GPT-2) and norms on embeddings (BLOOM) aren't supported",
        )

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """One decoder layer on hidden states [batch, length, hidden] of a length that `prologue` has seen."""
        output = layer(hidden, **self._template_kwargs[hidden.shape[1]][index])
        return output[0] if isinstance(output, tuple) else output

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm on hidden states [..., hidden]."""
        if self._norm is None:
            return hidden
        name = self._name_of(self._norm)
        weights = {key: self._load(f"{name}.{key}", p.shape) for key, p in self._norm.named_parameters()}
        return torch.func.functional_call(self._norm, weights, (hidden,))

    @property
    def vocabulary(self) -> int:
        """How many logits the model makes per token."""
        return self._model.get_output_embeddings().weight.shape[0]

    def head(self, start: int, stop: int) -> Head:
        """The rows of the output projection (which may be the embedding table again) that make logits start to stop."""
        name = self._head_name
        bias = self._model.get_output_embeddings().bias
        if bias is not None:
            bias = self._load(f"{name}.bias", bias.shape)[start:stop]
        if (linear := self._head_linear) is not None:
            weight = linear.dequantize(start, stop).to(device=self.device, dtype=self.dtype)
            return Head(weight, bias, input_quantizer(linear))
        self._check_shape(f"{name}.weight", self._model.get_output_embeddings().weight.shape)
        weight = self.weights.rows(f"{name}.weight", start, stop)
        return Head(weight.to(device=self.device, dtype=self.dtype), bias, None)

    def logits(self, hidden: torch.Tensor, head: Head) -> torch.Tensor:
        """Logits [tokens, rows] float32 of normalized hidden states [tokens, hidden], by the model's own code.

        Only its base model and output projection are replaced, so scaled and capped logits come out as it makes them.
        """
        from transformers.modeling_outputs import MoeModelOutputWithPast

        output = self._model.get_output_embeddings()
        made = MoeModelOutputWithPast(last_hidden_state=hidden[None])  # what any architecture looks for is in it
        self._base.forward = lambda *_a, **_k: made
        output.forward = head.project
        try:
            return self._model(inputs_embeds=hidden[None], use_cache=False).logits[0].float()
        finally:
            del self._base.__dict__["forward"], output.__dict__["forward"]

    @cached_property
    def _head_name(self) -> str:
        name = self._name_of(self._model.get_output_embeddings())
        tied = self._model.config.get_text_config().tie_word_embeddings
        return self._embedding_name if tied and f"{name}.weight" not in self.weights else name

    @cached_property
    def _head_linear(self) -> QuantizedLinear | None:
        linear = self.weights.linear(self._head_name)
        if linear is not None:
            self._check_shape(f"{self._head_name}.weight", self._model.get_output_embeddings().weight.shape)
        return linear

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a parameter of the model."""
        return name if name in self.weights else self._names.stored(name)

    def routed(self, index: int) -> RoutedExperts | None:
        """The routed experts of a layer; None where it has none."""
        return next((module for module in self._layers[index].modules() if isinstance(module, RoutedExperts)), None)

    @property
    def heads(self) -> int:
        """Attention heads, whose rows interleave in some fused projections."""
        return getattr(self._model.config.get_text_config(), "num_attention_heads", None) or 1

    @property
    def experts_per_token(self) -> int:
        """How many routed experts a token goes to."""
        return getattr(self._model.config.get_text_config(), "num_experts_per_tok", None) or 1

    def is_kept_in_float32(self, name: str) -> bool:
        """Whether the architecture wants this parameter or buffer in float32 whatever the rest is in."""
        return any(part in name for part in self._kept_in_float32)

    def linears(self) -> list[str]:
        """The linears of all decoder layers and their experts, by the checkpoint's names without ".weight"."""
        found = []
        for index, layer in enumerate(self._layers):
            for name in linear_layers(layer):
                found.append(self.stored_name(f"{self.layer_name(index)}.{name}.weight").removesuffix(".weight"))
            routed = self.routed(index)
            if routed is not None:
                found += [linear for expert in routed.names for linear in expert]
        return found

    def expert(self, module: RoutedExperts, number: int) -> Expert:
        """An expert with its weights loaded.

        Raises:
            InputError: a tensor is missing, of another shape, or holds NaN.
        """
        names = module.names[number]
        shape = self.weights.shape(f"{names.gate}.weight")
        shapes = {names.gate: shape, names.up: shape, names.down: shape[::-1]}
        loaded = {}
        quantizers: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {}
        for name in names:
            linear = self.weights.linear(name)
            size = torch.Size(shapes[name])
            if linear is None:
                loaded[name] = self._load(f"{name}.weight", size)
            else:
                loaded[name] = self._dequantized(f"{name}.weight", linear, size)
            quantizers[name] = None if linear is None else input_quantizer(linear)
        return Expert(
            loaded[names.gate],
            loaded[names.up],
            loaded[names.down],
            module.apply_gate,
            quantizers[names.gate],
            quantizers[names.down],
        )

    def _take_out_experts(self) -> None:
        """Put a RoutedExperts in place of every fused module, so that a layer's parameters are those of the rest."""
        for index, layer in enumerate(self._layers):
            for name, module in [*layer.named_modules()]:
                if not experts.is_fused(module):
                    continue
                full_name, where = f"{self.layer_name(index)}.{name}", str(self.checkpoint.path)
                experts.refuse_unusual(module, full_name, where)
                count, width = module.get_parameter("down_proj").shape[:2]
                names = self._names.experts(full_name, count, where)
                self._check_experts(names, tuple(module.get_parameter("down_proj").shape[1:]))
                routed = RoutedExperts(module, names, experts.router_of(layer, name, count, width))
                routed.handler = partial(self._run_experts, routed)
                layer.set_submodule(name, routed)

    def _check_experts(self, names: list[ExpertNames], down: tuple[int, ...]) -> None:
        for expert in names:
            for name, shape in zip(expert, (down[::-1], down[::-1], down), strict=True):
                self._check_shape(f"{name}.weight", torch.Size(shape))

    def _run_experts(
        self, module: RoutedExperts, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        count = len(module.names)
        routing = Routing(chosen, weights, count)
        busy = (number for number, tokens in enumerate(routing.counts(count)) if tokens)
        return experts.run_all(((number, self.expert(module, number)) for number in busy), routing, hidden)

    @cached_property
    def _names(self) -> Names:
        return Names(self._model, self.weights.names)

    def skeleton_layer(self, index: int) -> nn.Module:
        """The layer without weights (meta device), for planning."""
        return self._layers[index]

    def _load(self, name: str, shape: torch.Size) -> torch.Tensor:
        self._check_shape(name, shape)
        dtype = torch.float32 if self.is_kept_in_float32(name) else self.dtype
        return self.weights.tensor(name, dtype).to(self.device)

    def _dequantized(self, name: str, linear: QuantizedLinear, shape: torch.Size) -> torch.Tensor:
        self._check_shape(name, shape)
        return linear.dequantize().to(device=self.device, dtype=self.dtype)

    def _check_shape(self, name: str, shape: torch.Size) -> None:
        if name not in self.weights:
            raise InputError(
                f"tensor {name} is missing",
                where=str(self.checkpoint.path),
                hint="the checkpoint is incomplete or its config.json belongs to another model",
            )
        if self.weights.shape(name) != tuple(shape):
            raise InputError(
                f"tensor {name} has shape {list(self.weights.shape(name))}, config.json makes it {list(shape)}",
                where=str(self.checkpoint.path),
                hint="check that config.json belongs to these weights",
            )

    def _name_of(self, wanted: nn.Module) -> str:
        return next(name for name, module in self._model.named_modules() if module is wanted)

    def _final_norm(self) -> nn.Module | None:
        parent = self._model.get_submodule(self._layers_name.rpartition(".")[0])
        norms = [
            child
            for name, child in parent.named_children()
            if "norm" in name.lower() and not isinstance(child, nn.ModuleList) and "embed" not in name.lower()
        ]
        return norms[-1] if norms else None

    def _initialize_buffers(self, module: nn.Module) -> None:
        """Fill buffers that no checkpoint holds (rotary frequencies) the way transformers itself does."""
        if not any(b is not None and b.is_meta for b in module._buffers.values()):
            return
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=self.device)
        with torch.device(self.device):
            self._model._init_weights(module)  # parameters are on the meta device, where this does nothing


@dataclass(frozen=True)
class Head:
    """Some rows of the output projection.

    Attributes:
        weight: [rows, hidden].
        bias: [rows] or None.
        quantize: what its input goes through when the projection is quantized.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    quantize: Callable[[torch.Tensor], torch.Tensor] | None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., rows]."""
        return nn.functional.linear(self.quantize(hidden) if self.quantize else hidden, self.weight, self.bias)


def input_quantizer(linear: QuantizedLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Fake quantization of what enters a quantized linear.

    Per token the scale is max|x| / 127.5 over integers -128..127, as in transformers with compressed-tensors and in
    qtool's own calibration; vLLM's int8 kernels take max|x| / 127, which rounds by another 0.4 % step.
    """
    return InputQuantizer.of(linear)


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa", trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, OSError, ImportError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(
            f"transformers can't build this model: {in_one_line(error)}",
            where=str(checkpoint.path / "config.json"),
            hint="check model_type; a newer transformers may know it; custom code needs --trust-remote-code",
        ) from error
    return model.eval()


def _decoder_layers(model: Any, checkpoint: Checkpoint) -> tuple[str, nn.ModuleList]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in lists:
        if len(module) == depth and module is not model:
            return name, module
    raise InputError(
        "no list of decoder layers in this model",
        where=str(checkpoint.path / "config.json"),
        hint=f"{type(model).__name__} is not a decoder-only language model",
    )
