"""On a device with a memory of its own every tensor is where it is used, and the result is that of a CPU."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.engines.native import device
from qtool.errors import InputError
from qtool.quant.statistics import InputStatistics
from tests import families
from tests.engines.accelerator import Accelerator


def test_the_accelerator_refuses_what_cuda_refuses() -> None:
    here, places = torch.arange(6.0), torch.tensor([4, 1])
    with Accelerator() as accelerator:
        there = here.to("cuda")
        assert there.device.type == (there * 2).device.type == torch.ones(2, device="cuda").device.type == "cuda"
        assert here.device.type == there.cpu().device.type == torch.zeros_like(there, device="cpu").device.type == "cpu"
        assert (there[places] + torch.tensor(1.0)).tolist() == [5, 2]
        there[2:4] = torch.tensor([7.0, 8.0])
        assert there.tolist() == [0, 1, 7, 8, 4, 5]
        assert here.tolist() == [0, 1, 2, 3, 4, 5]
        for refused in (
            lambda: here + there,
            lambda: here[places.to("cuda")],
            lambda: torch.cat((here, there)),
            lambda: here * there.sum(),
            lambda: there.__setitem__(places, torch.ones(2)),
            lambda: here.index_add_(0, places, there[:2]),
            lambda: torch.nn.functional.linear(there, torch.ones(3, 6)),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                refused()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
    assert accelerator.operations


@pytest.mark.parametrize(
    ("model_type", "scheme"),
    [("llama", "w8a8"), ("gemma2", "w8a8-dynamic"), ("qwen3_moe", "w8a8"), ("deepseek_v3", "w8a8-dynamic")],
)
def test_quantizing_on_a_device(
    model_type: str,
    scheme: str,
    make_model: Callable[..., Path],
    tiny_tokenizer: Any,
    quantize: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if model_type in families.FAMILIES:
        model = families.make(tmp_path / "model", model_type, tiny_tokenizer)
    else:
        more = {"query_pre_attn_scalar": 32, "sliding_window": 8} if model_type == "gemma2" else {}
        model = make_model(model_type, name=f"device-{model_type}", **more)
    monkeypatch.setattr(device, "compute_dtype", lambda _device, exact: torch.float32)
    normal = quantize(model, tmp_path / "cpu", scheme=scheme)
    monkeypatch.setattr(device, "choose", lambda _wanted, exact: "cuda")
    with Accelerator() as accelerator:
        report = quantize(model, tmp_path / "cuda", scheme=scheme)
    assert accelerator.operations > 1000
    assert (normal["device"], report["device"]) == ("cpu", "cuda")
    assert report["layers"] == normal["layers"]
    expected, found = families.load(tmp_path / "cpu"), families.load(tmp_path / "cuda")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("scheme", "effort"), [("w4a16-g32", "normal"), ("w4a16-asymmetric-g32", "high")])
def test_int4_on_a_device(
    scheme: str,
    effort: str,
    tiny_llama: Path,
    quantize: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is searched and refined there comes out as here."""
    policies = [{"layers": ".*lm_head", "quantize": False}, {"layers": ".*", "scheme": scheme}]
    recipe: dict[str, Any] = {"default_scheme": "few", "schemes": {"few": policies}, "effort": effort}
    monkeypatch.setattr(device, "compute_dtype", lambda _device, exact: torch.float32)
    quantize(tiny_llama, tmp_path / "cpu", scheme="few", **recipe)
    monkeypatch.setattr(device, "choose", lambda _wanted, exact: "cuda")
    with Accelerator():
        quantize(tiny_llama, tmp_path / "cuda", scheme="few", **recipe)
    expected, found = families.load(tmp_path / "cpu"), families.load(tmp_path / "cuda")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


_LARGE = {"hidden_size": 512, "intermediate_size": 1280, "num_attention_heads": 8, "num_key_value_heads": 4}

_ALLOWED = {
    "floats.py:finite: aminmax",  # of the embeddings, which lie outside of the layers
    "schedule.py:_finish_lot: add",  # the experts' outputs, which are summed up in a file
}


@pytest.mark.parametrize("smoothing", ["osl", "smoothquant"])
@pytest.mark.parametrize(
    ("model_type", "limit"), [("llama", 1 << 20), ("qwen3_moe", 1 << 16), ("deepseek_v3", 1 << 16)]
)
def test_nothing_large_is_computed_in_main_memory(
    model_type: str,
    limit: int,
    smoothing: str,
    make_model: Callable[..., Path],
    tiny_tokenizer: Any,
    quantize: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit is less than the smallest weight of the experts, or the Hessian of what enters them."""
    if model_type == "llama":
        model = make_model("llama", name="device-large", num_hidden_layers=1, **_LARGE)
    else:
        model = families.make(tmp_path / "model", model_type, tiny_tokenizer)
    policies = [
        {"layers": ".*lm_head", "quantize": False},
        {"layers": ".*", "activations": {"mode": "dynamic"}, "smoothing": smoothing, "clip": True, "rounding": "gptq"},
    ]
    monkeypatch.setattr(device, "compute_dtype", lambda _device, exact: torch.float32)
    monkeypatch.setattr(device, "choose", lambda _wanted, exact: "cuda")
    with Accelerator(limit) as accelerator:
        quantize(model, tmp_path / "out", default_scheme="w8a8-dynamic", schemes={"w8a8-dynamic": policies})
    assert accelerator.in_main_memory <= (_ALLOWED if model_type in families.FAMILIES else set())


def test_pickled_statistics_are_in_main_memory() -> None:
    with Accelerator():
        seen = InputStatistics(stride=2, with_hessian=True)
        seen.update(torch.arange(24.0).reshape(2, 3, 4).to("cuda"))
        assert {seen.low.device.type, seen.hessian.device.type, seen.sample.device.type} == {"cuda"}
        there = pickle.loads(pickle.dumps(seen))
        assert {there.low.device.type, there.hessian.device.type, there.sample.device.type} == {"cpu"}
        assert there.hessian.tolist() == seen.hessian.tolist()
        assert there.sample.tolist() == seen.sample.tolist()
        assert there.to("cuda").device.type == "cuda"


def test_exact_osl_stays_in_main_memory() -> None:
    assert device.choose("auto", exact=True) == "cpu"
    with pytest.raises(InputError, match="can't use npu"):
        device.choose("npu", exact=True)
