"""transformers' own model class on the meta device: a decoder without weights, and where its parts are."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from qtool.checkpoint.auto import auto_class
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.transposed import has_transposed, is_transposed
from qtool.errors import InputError, foreign
from qtool.model import architectures
from qtool.model.towers import without_timm

_MOST_BUFFERS = 1 << 30  # bytes


class Skeleton:
    """A decoder whose parameters are on the meta device; buffers that no checkpoint holds are filled.

    Args:
        checkpoint: config.json, and with `trust_remote_code` the modelling code, are read.
        dtype: of the parameters.
        device: of the buffers.
        trust_remote_code: allow the checkpoint's own modelling code.

    Raises:
        InputError: transformers doesn't know the architecture, or it is no decoder with a list of layers.

    Attributes:
        model: the whole model, with towers for pictures and sound where it has any.
        decoder: the model of text in it, from token ids to what enters the output projection.
        base: what the whole model's forward calls before its output projection.
        architecture: what is known of the family.
        layers_name, layers: the list of decoder layers.
        embedding: the token embeddings.
        kept_in_float32: parameters and buffers with one of these in their name are in float32 whatever the rest is in.
        tensors: of the whole model as transformers built it, parameters and buffers, by their names.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool
    ) -> None:
        self._where = str(checkpoint.path / "config.json")
        self.model = _build(checkpoint, dtype, trust_remote_code, self._where)
        if has_transposed(checkpoint.config):
            _as_linears(self.model, checkpoint.config)
        self.tensors: dict[str, torch.Tensor] = self.model.state_dict(keep_vars=True)
        self.embedding: nn.Module = self.model.get_input_embeddings()
        self.decoder: Any = self._innermost_model(self.embedding)
        self.base: nn.Module = self.model.base_model if self.model.base_model is not self.model else self.decoder
        self.architecture = architectures.of(self.config.model_type)
        name = self.architecture.layers(self.decoder, self.config)
        if name is None:
            raise InputError(
                "no list of decoder layers in this model",
                where=self._where,
                hint=f"{type(self.model).__name__} is not a decoder-only language model",
            )
        layers = self.decoder.get_submodule(name)
        assert isinstance(layers, nn.ModuleList)
        self.layers = layers
        self.layers_name = self.name_of(self.layers)
        self._check_single()
        self.kept_in_float32: tuple[str, ...] = tuple(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        self._check_buffers()
        self._initialize_buffers(self.decoder, device)

    @property
    def config(self) -> Any:
        """transformers' config of the model of text."""
        return self.decoder.config.get_text_config(decoder=True)

    @property
    def heads(self) -> int:
        """Attention heads, whose rows interleave in some fused projections."""
        return getattr(self.config, self.architecture.heads, None) or 1

    @property
    def experts_per_token(self) -> int:
        """How many routed experts a token goes to."""
        return getattr(self.config, self.architecture.experts_per_token, None) or 1

    @cached_property
    def head(self) -> nn.Module:
        """The output projection. Raises InputError when the model has none, or several."""
        for module in (self.model, *self._models_around(self.embedding)):
            found = module.get_output_embeddings()
            if isinstance(found, nn.Module) and isinstance(getattr(found, "weight", None), torch.Tensor):
                return found
        raise InputError(
            f"{type(self.model).__name__} has no output projection to a vocabulary",
            where=self._where,
            hint="its layers can be quantized, but qtool can't compare its tokens",
        )

    @cached_property
    def outer_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the whole model that aren't in decoder layers, by their names."""
        prefix = f"{self.layers_name}."
        return {name: each for name, each in self.model.named_parameters() if not name.startswith(prefix)}

    def name_of(self, wanted: nn.Module) -> str:
        """What the whole model calls a module."""
        return next(name for name, module in self.model.named_modules() if module is wanted)

    def unusual(self, sign: str) -> InputError:
        """About a model whose forward does what qtool can't follow; `sign` is how that showed."""
        return InputError(
            f"qtool can't run the layers of {type(self.model).__name__} one by one: {sign}",
            where=self._where,
            hint="it runs decoders whose layers follow each other, from token ids to logits",
        )

    def _models_around(self, module: nn.Module) -> list[Any]:
        """transformers' models that a module is in, the innermost first."""
        from transformers import PreTrainedModel

        parts = self.name_of(module).split(".")
        around = [self.model.get_submodule(".".join(parts[:depth])) for depth in reversed(range(len(parts)))]
        return [each for each in around if isinstance(each, PreTrainedModel)]

    def _innermost_model(self, module: nn.Module) -> Any:
        return self._models_around(module)[0]

    def _check_single(self) -> None:
        """Layers that are used a second time, elsewhere, get inputs there that no run of the first ones shows."""
        prefix = f"{self.layers_name}."
        for target, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            for own, other in ((target, source), (source, target)):
                if own.startswith(prefix) and not other.startswith(prefix):
                    raise self.unusual(f"{own} works a second time, as {other}, on other inputs")

    def _check_buffers(self) -> None:
        """They take memory before any weight does: GPT-2's masks grow with the square of its context."""
        wanted = sum(buffer.nbytes for buffer in self.decoder.buffers())
        if wanted > _MOST_BUFFERS:
            what = f"what config.json describes takes {wanted:,} bytes besides its weights"
            raise InputError(what, where=self._where, hint="check max_position_embeddings and head_dim")

    def fill_all_buffers(self, device: torch.device) -> None:
        """As for the model of text, for the towers: each of transformers' models fills its own."""
        from transformers import PreTrainedModel

        for module in reversed([*self.model.modules()]):
            if isinstance(module, PreTrainedModel):
                self._initialize_buffers(module, device)

    def _initialize_buffers(self, model: Any, device: torch.device) -> None:
        """Fill buffers that no checkpoint holds (rotary frequencies) the way transformers itself does.

        A module fills its own, or one around it does: Falcon-H1's model fills those of its layers.
        """
        empty: set[nn.Module] = set()
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
                    empty.add(module)
        with torch.device(device):
            for module in model.modules():
                if not empty.isdisjoint(module.modules()):
                    model._init_weights(module)  # parameters are on the meta device, where this does nothing


def _as_linears(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Put the linear that it is in place of every Conv1D, whose weight is [in, out]."""
    for name, module in [*model.named_modules()]:
        weight = module._parameters.get("weight")
        if is_transposed(config, name) and weight is not None:
            linear = nn.Linear(weight.shape[0], weight.shape[1], device=weight.device, dtype=weight.dtype)
            model.set_submodule(name, linear.train(module.training))


def _build(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool, where: str) -> Any:
    checkpoint.check_claims()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    hint = "check model_type; a newer transformers may know it; custom code needs --trust-remote-code"
    with foreign("transformers can't build this model", where=where, hint=hint):
        config = _configuration(checkpoint, trust_remote_code)
        config._attn_implementation = None  # sdpa where every part of the model has it, else what it has
        with torch.device("meta"), without_timm():
            model = auto_class(config).from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
            )
        return model.eval()


def _configuration(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """transformers' own. A type that it doesn't know may come with code for a class that it has: Kimi-K2, of model_type
    kimi_k2, is a DeepseekV3ForCausalLM. Then the class's configuration is taken, and no code of the model's runs."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = checkpoint.config.get("auto_map")
    named = str((checkpoint.config.get("architectures") or [""])[0])
    known = getattr(getattr(transformers, named, None), "config_class", None)
    brought = {str(each).rpartition(".")[2] for each in own.values()} if isinstance(own, dict) else set()
    if checkpoint.config.get("model_type") in CONFIG_MAPPING or named not in brought or known is None:
        return transformers.AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=trust_remote_code)
    config = known.from_pretrained(str(checkpoint.path))
    config.auto_map = {}
    return config
