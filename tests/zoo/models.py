"""Tiny random models, saved by transformers, with numbers that make smoothing and clipping matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.zoo import configs


def auto_class(kind: str) -> Any:
    """transformers' class that loads models of this kind, "text" or "image"."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if kind == "text" else AutoModelForImageTextToText


def make(
    kind: str,
    model_type: str,
    folder: Path,
    sizes: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A model of a type in bfloat16, without a tokenizer.

    Args:
        sizes: in place of the small ones, of fields that the type's configuration has, or that of its model of text.
        more: whatever fields it has.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    settings = configs.settings(config_class())
    for part in (settings, settings.get("text_config", {})):
        part |= {name: size for name, size in (sizes or {}).items() if name in part}
    settings = configs.merged(settings, {**(more or {})})
    config = config_class(**settings)
    config.dtype = torch.bfloat16
    torch.manual_seed(seed)
    model = auto_class(kind).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        _fill(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    if model_type in configs.PREFIXED:
        file = folder / "model.safetensors"
        save_file({name.removeprefix("model."): each for name, each in load_file(file).items()}, file, {"format": "pt"})
    return folder


def pictures(model_type: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model wants besides token ids [samples, length]."""
    sizes, found = {"samples": ids.shape[0], "length": ids.shape[1]}, {}
    generator = torch.Generator().manual_seed(3)
    for name, shape in configs.INPUTS.get(model_type, {}).items():
        size = [sizes[each] if isinstance(each, str) else each for each in shape]
        if name.endswith("ids"):
            found[name] = torch.randint(4, 400, size, generator=generator)
        elif name.endswith("mask"):
            found[name] = torch.zeros(size, dtype=torch.int64)
            found[name][:, : configs.QUERIES if name.startswith("image_embeds") else 0] = 1
        else:
            found[name] = torch.randn(size, generator=generator)
    return found


def vocabulary(model: Any) -> int:
    """How many ids text has."""
    size: int = model.get_input_embeddings().weight.shape[0]
    return min(size, configs.MARKS.start)


def text(model: Any, samples: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [samples, length]: some often, most seldom, as in a language."""
    generator = torch.Generator().manual_seed(seed)
    count = vocabulary(model) - 4
    weights = 1.0 / torch.arange(1, count + 1)
    return 4 + torch.multinomial(weights, samples * length, replacement=True, generator=generator).reshape(samples, -1)


def _fill(model: Any) -> None:
    """Random numbers: a few channels of embeddings and norms are loud, rows differ, biases aren't 0."""
    hidden = model.get_input_embeddings().weight.shape[1]
    loud = torch.randperm(hidden)[: max(2, hidden // 20)]
    done: set[int] = set()
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done or not parameter.is_floating_point():
                continue
            done.add(id(parameter))
            _fill_one(f"{name}.{part}", module, part, parameter, loud)


def _fill_one(name: str, module: nn.Module, part: str, parameter: torch.Tensor, loud: torch.Tensor) -> None:
    if isinstance(module, nn.Embedding):
        parameter.normal_(0, 0.5)
        if parameter.shape[1] > int(loud.max()):
            parameter[:, loud] *= 6
    elif parameter.dim() == 1 and re.search(r"norm|ln_|layer_?norm", name.lower()) and part == "weight":
        zero_centered = float(parameter.abs().max()) == 0
        gain = 0.6 + 0.8 * torch.rand(parameter.shape)
        gain[loud[loud < len(gain)]] *= 3
        parameter.copy_(gain - 1 if zero_centered else gain)
    elif part == "bias" or part.endswith("_bias"):
        if "correction" in name or "router" in name or "e_score" in name:
            parameter.add_(0.02 * torch.randn(parameter.shape))
        elif isinstance(module, (nn.Linear, nn.LayerNorm)) or "expert" in name or type(module).__name__ == "Conv1D":
            parameter.normal_(0, 0.1)
    elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or _is_experts(name, parameter):
        axis = 0 if type(module).__name__ == "Conv1D" else parameter.dim() - 1
        parameter.normal_(0, parameter.shape[axis] ** -0.5)
        if parameter.dim() == 2:
            rows = (1, -1) if axis == 0 else (-1, 1)
            spread = torch.exp(0.3 * torch.randn(parameter.shape[1 - axis]))
            if len(spread) > 8 and re.search(r"(up_proj|v_proj)$", name.removesuffix(".weight")):
                spread[torch.randperm(len(spread))[:2]] *= 6
            parameter.mul_(spread.reshape(rows))


def _is_experts(name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() == 3 and "conv" not in name and min(parameter.shape[1:]) >= 16
