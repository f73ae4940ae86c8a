"""transformers' own model class on the meta device: a decoder without weights, and where its parts are."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError, foreign, in_one_line
from qtool.model import architectures

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
        model: the whole model; `base` is what is in it besides the output projection.
        architecture: what is known of the family.
        layers_name, layers: the list of decoder layers.
        embedding_name, embedding: the token embeddings.
        norm_name, norm: after the last layer, if any.
        head_name, head: the output projection.
        kept_in_float32: parameters and buffers with one of these in their name are in float32 whatever the rest is in.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool
    ) -> None:
        self._where = str(checkpoint.path / "config.json")
        self.model = _build(checkpoint, dtype, trust_remote_code, self._where)
        self.base: nn.Module = self.model.base_model
        self.architecture = architectures.of(self._config.model_type)
        name = self.architecture.layers(self.model)
        if name is None:
            raise InputError(
                "no list of decoder layers in this model",
                where=self._where,
                hint=f"{type(self.model).__name__} is not a decoder-only language model",
            )
        self.layers_name: str = name
        self.layers: nn.ModuleList = self.model.get_submodule(name)
        self.embedding: nn.Module = self.model.get_input_embeddings()
        self.embedding_name = self._name_of(self.embedding)
        if getattr(self.embedding, "padding_idx", None) is not None:
            self.embedding.padding_idx = None  # matters to gradients only, and rows get renumbered
        self.norm_name = self.architecture.final_norm(self.model, name)
        self.norm: nn.Module | None = None if self.norm_name is None else self.model.get_submodule(self.norm_name)
        self.head: nn.Module = self.model.get_output_embeddings()
        self.head_name = self._name_of(self.head)
        self.kept_in_float32: tuple[str, ...] = tuple(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        self._check_buffers()
        for module in self.base.modules():
            self._initialize_buffers(module, device)

    @property
    def heads(self) -> int:
        """Attention heads, whose rows interleave in some fused projections."""
        return getattr(self._config, self.architecture.heads, None) or 1

    @property
    def experts_per_token(self) -> int:
        """How many routed experts a token goes to."""
        return getattr(self._config, self.architecture.experts_per_token, None) or 1

    @property
    def is_tied(self) -> bool:
        """The output projection is the embedding table, unless the checkpoint has one of its own."""
        return bool(self._config.tie_word_embeddings)

    def layer_arguments(self, hidden: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Have the base model call its layers, without running them, for embeddings [batch, length, hidden].

        Returns:
            (the first layer's hidden states; per layer the other arguments: masks, rotary embeddings, whatever the
            architecture hands down).

        Raises:
            InputError: the base model has weights of its own besides embeddings, layers and norm.
        """
        first: list[torch.Tensor] = []
        arguments: list[dict[str, Any]] = []
        architecture = self.architecture

        class Listener(nn.Module):
            def __init__(self, original: nn.Module) -> None:
                super().__init__()
                for name in architecture.layer_attributes:
                    if hasattr(original, name):
                        setattr(self, name, getattr(original, name))

            def forward(self, hidden_states: torch.Tensor, **kw: Any) -> torch.Tensor | tuple[torch.Tensor]:
                if not first:
                    first.append(hidden_states)
                arguments.append(kw)
                return (hidden_states,) if architecture.layers_return_tuples else hidden_states

        parent_name, _, attribute = self.layers_name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        setattr(parent, attribute, nn.ModuleList(Listener(layer) for layer in self.layers))
        if self.norm is not None:
            self.norm.forward = lambda x, *_a, **_k: x  # its weights are not loaded
        try:
            self.base(inputs_embeds=hidden, use_cache=False)
        except RuntimeError as error:  # most likely it came upon a weight that is not loaded
            raise self.unusual(in_one_line(error)) from error
        finally:
            setattr(parent, attribute, self.layers)
            if self.norm is not None:
                del self.norm.__dict__["forward"]
        return first[0], arguments

    def unusual(self, sign: str) -> InputError:
        """About a model that is more than embeddings, layers and a norm; `sign` is how that showed."""
        known = [module for module in (self.embedding, self.norm, *self.layers) if module is not None]
        usual = {id(parameter) for module in known for parameter in module.parameters()}
        others = [name for name, parameter in self.base.named_parameters() if id(parameter) not in usual]
        return InputError(
            f"{type(self.model).__name__} has more around its decoder layers than qtool runs: "
            + (", ".join(others[:3]) or sign),
            where=self._where,
            hint="learned positions (OPT, GPT-2) and norms on embeddings (BLOOM) aren't supported",
        )

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config()

    def _name_of(self, wanted: nn.Module) -> str:
        return next(name for name, module in self.model.named_modules() if module is wanted)

    def _check_buffers(self) -> None:
        """They take memory before any weight does: GPT-2's masks grow with the square of its context."""
        wanted = sum(buffer.nbytes for buffer in self.base.buffers())
        if wanted > _MOST_BUFFERS:
            what = f"what config.json describes takes {wanted:,} bytes besides its weights"
            raise InputError(what, where=self._where, hint="check max_position_embeddings and head_dim")

    def _initialize_buffers(self, module: nn.Module, device: torch.device) -> None:
        """Fill buffers that no checkpoint holds (rotary frequencies) the way transformers itself does."""
        if not any(b is not None and b.is_meta for b in module._buffers.values()):
            return
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        with torch.device(device):
            self.model._init_weights(module)  # parameters are on the meta device, where this does nothing


def _build(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool, where: str) -> Any:
    checkpoint.check_claims()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoConfig

    hint = "check model_type; a newer transformers may know it; custom code needs --trust-remote-code"
    with foreign("transformers can't build this model", where=where, hint=hint):
        config = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=trust_remote_code)
        try:
            return _from_config(config, dtype, trust_remote_code, "sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            return _from_config(config, dtype, trust_remote_code, "eager")  # the family has no other


def _from_config(config: Any, dtype: torch.dtype, trust_remote_code: bool, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    return model.eval()
