"""W8A8 written and computed without qtool: rounding to nearest in numpy, int8 arithmetic imitated in float32.

`nearest` writes the plainest W8A8 checkpoint of a model, `load` computes what any compressed-tensors W8A8 checkpoint
means, experts included, which transformers 5 fuses.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests import families

# A static input's step and zero point, or None: each token has a step of its own.
Fixed = tuple[float, float] | None
# What a router gives: (scores [tokens, experts], weights [tokens, k], the experts' numbers [tokens, k]), by layer.
Route = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Routes = dict[int, Route]

_ATTENTION = r".*\.self_attn\.(q_a|q_b|q|k|v|o|kv_a)_proj(_with_mqa)?"
_FEED_FORWARD = r".*\.(mlp|block_sparse_moe)\.(.*\.)?(gate_proj|up_proj|down_proj|w1|w2|w3)"


def rounded_rows(weight: np.ndarray, stored: torch.dtype = torch.float32) -> tuple[np.ndarray, np.ndarray]:
    """Each row in 255 steps over twice its largest magnitude.

    Args:
        weight: float32 [out, in].
        stored: the type that a step is rounded to.

    Returns:
        (int8 [out, in], float32 [out]).
    """
    scale = (2 * np.abs(weight).max(axis=1).astype(np.float64) / 255).astype(np.float32)
    scale = torch.from_numpy(np.where(scale == 0, np.float32(1), scale)).to(stored).float().numpy()
    return np.clip(np.rint(weight / scale[:, None]), -128, 127).astype(np.int8), scale


def is_quantized(name: str, depth: int) -> bool:
    """Whether the W8A8 recipes quantize a linear: attention but kv_b_proj, and feed-forward but routers."""
    number = re.search(r"layers\.(\d+)\.", name)
    inside = number is not None and int(number[1]) < depth
    return inside and bool(re.fullmatch(_ATTENTION, name) or re.fullmatch(_FEED_FORWARD, name))


def nearest(source: Path, target: Path, calibration: torch.Tensor | None = None) -> Path:
    """A compressed-tensors W8A8 checkpoint of a float one: no smoothing, no clipping, rounded to nearest.

    Args:
        calibration: token numbers [samples, tokens]. With it attention's inputs are static, from minimum to maximum.
    """
    config = json.loads((source / "config.json").read_text())
    depth = config["num_hidden_layers"]
    ranges = {} if calibration is None else _ranges(source, calibration)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in families.load(source).items():
        linear = name.removesuffix(".weight")
        if linear == name or not is_quantized(linear, depth):
            tensors[name] = tensor
            continue
        integers, scale = rounded_rows(tensor.float().numpy(), tensor.dtype)
        tensors[name] = torch.from_numpy(integers)
        tensors[f"{name}_scale"] = torch.from_numpy(scale)[:, None].to(tensor.dtype)
        if linear in ranges:
            low, high = ranges[linear]
            step = (high - low) / 255
            tensors[f"{linear}.input_scale"] = torch.tensor([step]).to(tensor.dtype)
            tensors[f"{linear}.input_zero_point"] = torch.tensor([round(-128 - low / step)], dtype=torch.int8)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    static = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [
            "lm_head",
            r"re:.*\.kv_b_proj$",
            r"re:.*\.(mlp|block_sparse_moe)\.gate$",
            rf"re:.*layers\.{depth}\.",
        ],
        "config_groups": {
            "group_0": {
                "targets": [f"re:{_ATTENTION}$"],
                "weights": weights,
                "input_activations": dynamic if calibration is None else static,
            },
            "group_1": {"targets": [f"re:{_FEED_FORWARD}$"], "weights": weights, "input_activations": dynamic},
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    families.save(tensors, target)
    return target


def load_float(folder: Path) -> Any:
    """A float checkpoint in transformers, float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of the layer that predicts one token further, which it doesn't load
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    finally:
        logging.set_verbosity(said)


def load(folder: Path) -> Any:
    """A compressed-tensors W8A8 checkpoint in transformers, computing in float32 what int8 kernels would."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    stored = families.load(folder)
    inputs: dict[str, Fixed] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith((".weight_scale", ".input_scale", ".input_zero_point")):
            continue
        number = re.search(r"layers\.(\d+)\.", name)
        if number is not None and int(number[1]) >= config["num_hidden_layers"]:
            continue
        tensors[name] = tensor
        if tensor.dtype == torch.int8:
            linear = name.removesuffix(".weight")
            tensors[name] = tensor.float() * stored[f"{name}_scale"].float()
            step, zero = stored.get(f"{linear}.input_scale"), stored.get(f"{linear}.input_zero_point")
            inputs[linear] = None if step is None else (float(step), 0.0 if zero is None else float(zero))
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
        families.save(tensors, Path(name))
        model = load_float(Path(name))
    _imitate(model, inputs)
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, routes: Routes | None = None) -> torch.Tensor:
    """float32 [samples, tokens, vocabulary]; with `routes` every token goes where they say."""
    handles = []
    for number, layer in enumerate(model.model.layers):
        if routes is not None and number in routes:
            forced = routes[number]
            handles.append(layer.mlp.gate.register_forward_hook(lambda _m, _a, _o, forced=forced: forced))
    try:
        return model(ids, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()


def routes(model: Any, ids: torch.Tensor) -> Routes:
    """Where transformers' own forward pass sends each token of `ids`.

    A rounding error that makes a token change its expert costs more than all others, and at random: to compare
    roundings, let every model send the tokens where the float model does.
    """
    found: Routes = {}
    handles = []
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):

            def keep(_: nn.Module, _args: Any, output: Route, number: int = number) -> None:
                found[number] = output

            handles.append(layer.mlp.gate.register_forward_hook(keep))
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def choices(model: Any, ids: torch.Tensor) -> dict[str, list[int]]:
    """How many tokens of `ids` go to each expert, per layer with experts."""
    return {
        f"model.layers.{number}": torch.bincount(
            chosen.flatten(), minlength=model.model.layers[number].mlp.experts.gate_up_proj.shape[0]
        ).tolist()
        for number, (_, _, chosen) in routes(model, ids).items()
    }


def divergence(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of logits from reference logits, in nats per token."""
    p, q = reference.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _fake(x: torch.Tensor, fixed: Fixed) -> torch.Tensor:
    if fixed is None:
        steps = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127.5
        return (x / steps).round().clamp(-128, 127) * steps
    step, zero = fixed
    return ((x / step + zero).round().clamp(-128, 127) - zero) * step


def _imitate(model: Any, inputs: dict[str, Fixed]) -> None:
    """Round what enters the quantized linears: `inputs` has the checkpoint's names."""
    renamed = {name.replace(".block_sparse_moe.", ".mlp."): fixed for name, fixed in inputs.items()}
    done = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name in renamed:
            module.register_forward_pre_hook(lambda _m, args, fixed=renamed[name]: (_fake(args[0], fixed), *args[1:]))
            done.add(name)
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            of_experts = {n: fixed for n, fixed in renamed.items() if n.startswith(f"{name}.")}
            if not of_experts:
                continue
            assert len(of_experts) == 3 * module.gate_up_proj.shape[0], f"{name}: some experts are quantized, some not"
            assert set(of_experts.values()) == {None}, f"{name}: only per-token activations are imitated for experts"
            module.forward = _experts_forward(module)
            done |= of_experts.keys()
    assert done == renamed.keys(), f"no such linears: {sorted(renamed.keys() - done)}"


def _experts_forward(module: Any) -> Callable[..., torch.Tensor]:
    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            token, position = torch.where(chosen == expert)
            gate, up = (_fake(hidden[token], None) @ module.gate_up_proj[expert].t()).chunk(2, dim=-1)
            inner = _fake(module.act_fn(gate) * up, None) @ module.down_proj[expert].t()
            output.index_add_(0, token, inner * weights[token, position, None])
        return output

    return forward


def _ranges(source: Path, calibration: torch.Tensor) -> dict[str, tuple[float, float]]:
    """The extremes, 0 included, of what enters each linear of attention."""
    model = load_float(source)
    found: dict[str, tuple[float, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(_ATTENTION, name):

            def widen(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                low, high = found.get(name, (0.0, 0.0))
                found[name] = min(low, float(args[0].min())), max(high, float(args[0].max()))

            module.register_forward_pre_hook(widen)
    logits(model, calibration)
    return found
