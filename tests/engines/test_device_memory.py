"""A device's memory decides how much goes there at a time; when it runs out all the same, the job goes on with less."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qtool.checkpoint.reader import Checkpoint
from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob, Resources
from qtool.engines.native import device, execute, prepare
from qtool.engines.native.context import Context, Setup
from qtool.errors import InputError, QtoolError
from qtool.quant import integer
from qtool.recipe.load import load
from qtool.recipe.schema import Recipe
from tests import families
from tests.engines.accelerator import Accelerator
from tests.engines.conftest import LENGTH, SAMPLES, Quiet

LARGE = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8, "num_key_value_heads": 4}


def job(model: Path, output: Path, **changes: Any) -> QuantizationJob:
    return QuantizationJob(
        model=model,
        output=OutputFolder(output, "compressed-tensors"),
        recipe=Recipe.model_validate(load("default").model_dump(mode="json")),
        scheme=changes.pop("scheme", "w8a8-dynamic"),
        calibration=changes.pop("calibration", CalibrationText("builtin", SAMPLES, LENGTH)),
        **changes,
    )


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "choose", lambda _wanted, exact: "cuda")
    monkeypatch.setattr(device, "compute_dtype", lambda _device, exact: torch.float32)


def large_model(folder: Path, **shape: int) -> Path:
    """A checkpoint of two layers of this shape whose files are holes."""
    config = AutoConfig.for_model("llama", num_hidden_layers=2, vocab_size=512, tie_word_embeddings=False, **shape)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = dict[str, Any](), 0
    for name, tensor in tensors.items():
        offsets = [end, end + 2 * tensor.numel()]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return folder


def test_llama_70b_fits_into_24_gb(tmp_path: Path) -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    checkpoint = Checkpoint.open(large_model(tmp_path, **shape))
    model = Setup(str(checkpoint.path), torch.bfloat16, "cpu", False, "compressed-tensors", 1).of(checkpoint).model
    (policy,) = {policy for policy in load("default").schemes["w8a8-dynamic"] if policy.layers == ".*"}
    policies = dict.fromkeys(model.linears(), policy)
    plans = {
        free: device.plan(model, policies, CalibrationText("builtin", 128, 512), 2048, free * 10**9)
        for free in (80, 22, 12)
    }
    assert plans[80].batch_tokens == 2048
    assert plans[80].elements == device.ELEMENTS
    assert plans[80].keeps_weights
    assert all(plans[free].needed <= free * 10**9 for free in (80, 22))
    # The Hessian of down_proj's input is 3.3 GB, and its factorization takes three more of that size.
    assert plans[22].needed >= 4 * 4 * 28672**2
    assert plans[12].needed > 12 * 10**9
    assert plans[12].batch_tokens == 512
    assert not plans[12].keeps_weights


@pytest.mark.usefixtures("on_a_device")
def test_when_memory_runs_out_the_rest_goes_there_in_smaller_parts(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model("llama", name="device-memory", num_hidden_layers=2, **LARGE)
    tokens = CalibrationText("builtin", 32, LENGTH)  # one batch, whose activations take more than the weights
    usual: Any = Quiet()
    with Accelerator() as plenty:
        execute.execute(prepare.prepare(job(model, tmp_path / "usual", calibration=tokens), usual), usual)
    assert usual.warnings == []
    short: Any = Quiet()
    with Accelerator(memory=int(plenty.peak * 0.7)) as little:
        execute.execute(prepare.prepare(job(model, tmp_path / "short", calibration=tokens), short), short)
    assert little.peak <= plenty.peak * 0.7
    assert short.warnings[0] == "the device's memory ran out: from here on 1024 tokens go through a layer at a time"
    expected, found = families.load(tmp_path / "usual"), families.load(tmp_path / "short")
    assert expected.keys() == found.keys()
    shares = [float((found[name] == tensor).float().mean()) for name, tensor in expected.items() if tensor.ndim == 2]
    assert min(shares) > 0.9  # sums over batches of another size are rounded elsewhere, and GPTQ passes it on
    integers = [name for name, tensor in expected.items() if tensor.dtype == torch.int8]
    assert max(int((found[name].int() - expected[name].int()).abs().max()) for name in integers) <= 2


def test_room_becomes_less_until_it_is_enough() -> None:
    told: list[int] = []
    room = device.Room(100, 20, told.append)

    def work(most: int) -> Callable[[int], int]:
        def run(size: int) -> int:
            if size > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return size

        return run

    assert room.fit(work(200)) == 100
    assert room.fit(work(30)) == 25
    assert room.fit(work(200)) == 25
    assert told == [50, 25]
    with pytest.raises(QtoolError, match="memory has run out") as failed:
        room.fit(work(10))
    assert "--seq-len" in str(failed.value.hint)

    def fail(_size: int) -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        room.fit(fail)


@pytest.mark.usefixtures("on_a_device")
def test_device_memory_is_kept_to(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("llama", name="device-memory", num_hidden_layers=2, **LARGE)
    report: Any = Quiet()
    with Accelerator() as accelerator:
        resources = Resources(device_memory=30 * 10**6)
        prepared = prepare.prepare(job(model, tmp_path / "out", resources=resources), report)
        assert prepared.on_device is not None
        assert prepared.on_device.batch_tokens == LENGTH
        assert ["0.0 GB are free" in warning for warning in report.warnings] == [True]
        execute.execute(prepared, report)
    assert accelerator.peak <= 30 * 10**6


@dataclass(frozen=True)
class Imitated(Setup):
    """Opens the model on an imitation of the card."""

    def open(self, card: int | None = None) -> Context:
        assert card in (0, 1)
        torch.set_num_threads(1)
        Accelerator().__enter__()
        return self.of(Checkpoint.open(self.path))


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_two_cards_give_what_one_gives(
    model_type: str, make_model: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    if model_type == "llama":
        model = make_model("llama", name="device-cards")
    else:
        model = families.make(tmp_path / "model", model_type, tiny_tokenizer)
    report: Any = Quiet()
    with Accelerator():
        for count in (1, 2):
            prepared = prepare.prepare(job(model, tmp_path / f"{count}", devices=count, scheme="w8a8"), report)
            imitated = Imitated(**vars(prepared.setup))
            execute.execute(prepare.Prepared(**vars(prepared) | {"setup": imitated}), report)
    one, two = families.load(tmp_path / "1"), families.load(tmp_path / "2")
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.usefixtures("on_a_device")
def test_cards_that_are_not_there(tiny_llama: Path, tmp_path: Path) -> None:
    report: Any = Quiet()
    with Accelerator(), pytest.raises(InputError, match="9 cards are asked for, 8 are there"):
        prepare.prepare(job(tiny_llama, tmp_path / "out", devices=9), report)
    with Accelerator(), pytest.raises(InputError, match="neither --workers nor --ray"):
        prepare.prepare(job(tiny_llama, tmp_path / "out", devices=2, resources=Resources(workers=1)), report)


def test_cards_and_no_device(tiny_llama: Path, tmp_path: Path) -> None:
    report: Any = Quiet()
    with pytest.raises(InputError, match="runs on the CPU"):
        prepare.prepare(job(tiny_llama, tmp_path / "out", devices=2, device="cpu"), report)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_the_compute_type_is_one_that_the_card_has(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _card: capability)
    assert device.compute_dtype("cuda", exact=False) == dtype


@pytest.mark.usefixtures("on_a_device")
def test_a_device_without_float64(
    tiny_llama: Path, tmp_path: Path, quantize: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Accelerator():
        quantize(tiny_llama, tmp_path / "with", scheme="w8a8")
    monkeypatch.setattr(integer, "_HAVE_FLOAT64", ("cpu",))
    with Accelerator(has_float64=False):
        quantize(tiny_llama, tmp_path / "without", scheme="w8a8")
    expected, found = families.load(tmp_path / "with"), families.load(tmp_path / "without")
    shares = [float((found[name] == tensor).float().mean()) for name, tensor in expected.items() if tensor.ndim == 2]
    assert min(shares) > 0.97  # ties in the search


def test_tf32_is_off_and_said_where_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.reduced_precision() is None
    torch.set_float32_matmul_precision("high")
    try:
        assert "TF32 is on" in str(device.reduced_precision())
    finally:
        torch.set_float32_matmul_precision("highest")
