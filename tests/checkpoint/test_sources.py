"""Models that others quantized, read as the float models they stand for, against packing as written out here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint import formats
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import summarize
from qtool.errors import InputError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


def into_words(fields: np.ndarray, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """int32 [rows, words] of small numbers [rows, n]; a word's field i is its number order[i]."""
    count = 32 // bits
    grouped = fields.reshape(len(fields), -1, count).astype(np.uint64)
    words = sum(grouped[:, :, number] << (bits * place) for place, number in enumerate(order))
    return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32))


def gptq(
    weight: torch.Tensor, seed: int, bits: int = 4, size: int = 32, v2: bool = False, shuffled: bool = True
) -> Packed:
    """AutoGPTQ's tensors of a weight [out, in], with groups in any order, and what they stand for, float32."""
    random = np.random.default_rng(seed)
    out, width = weight.shape
    group = np.arange(width) // size
    group = random.permutation(group) if shuffled else group
    codes = random.integers(0, 1 << bits, (width, out))
    zeros = random.integers(1, 1 << bits, (width // size, out))
    scales = (np.abs(random.normal(0.002, 0.001, zeros.shape)) + 1e-4).astype(np.float16)
    tensors = {
        "qweight": into_words(codes.T, bits, tuple(range(32 // bits))).t().contiguous(),
        "qzeros": into_words(zeros - (not v2), bits, tuple(range(32 // bits))),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    stands_for = (codes - zeros[group]).astype(np.float32) * scales[group].astype(np.float32)
    return tensors, torch.from_numpy(stands_for.T.copy())


def awq(weight: torch.Tensor, seed: int, size: int = 32) -> Packed:
    """AutoAWQ's."""
    random = np.random.default_rng(seed)
    out, width = weight.shape
    codes = random.integers(0, 16, (width, out))
    zeros = random.integers(0, 16, (width // size, out))
    scales = (np.abs(random.normal(0.002, 0.001, zeros.shape)) + 1e-4).astype(np.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": into_words(codes, 4, order),
        "qzeros": into_words(zeros, 4, order),
        "scales": torch.from_numpy(scales),
    }
    group = np.arange(width) // size
    stands_for = (codes - zeros[group]).astype(np.float32) * scales[group].astype(np.float32)
    return tensors, torch.from_numpy(stands_for.T.copy())


def compressed(scheme: str) -> Callable[[torch.Tensor, int], Packed]:
    def pack(weight: torch.Tensor, seed: int) -> Packed:
        from tests.checkpoint.test_packed import FORM, random_linear

        linear = random_linear(scheme, len(weight), weight.shape[1], seed=seed)
        tensors = FORM.tensors("x", linear, torch.float32)
        return {name.removeprefix("x."): tensor for name, tensor in tensors.items()}, linear.dequantize()

    return pack


def fp4(kind: str) -> Callable[[torch.Tensor, int], Packed]:
    """As compressed-tensors compresses it, and what it makes of that again."""

    def pack(weight: torch.Tensor, seed: int) -> Packed:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        size = FP4[kind]["group_size"]
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
        peak = noise.unflatten(1, (-1, size)).abs().amax(dim=2)
        state = {"weight": noise, "weight_scale": (peak / 6).log2().ceil().exp2()}
        if kind == "nvfp4":
            factor = 6 * 448 / float(peak.max())
            state["weight_scale"] = (peak / 6 * factor).to(torch.float8_e4m3fn).float()
            state["weight_global_scale"] = torch.tensor([factor])
        scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": FP4[kind]})
        compressor = BaseCompressor.get_value_from_registry(f"{kind}-pack-quantized")
        made = compressor.compress(state, scheme)
        if kind == "mxfp4":  # theirs is rounded to bfloat16; powers of two lose nothing
            return made, compressor.decompress(dict(made), scheme)["weight"].float()
        stands_for = compressor.decompress(dict(made), scheme)["weight"]
        codes = made["weight_packed"]
        ours = e2m1(codes).unflatten(1, (-1, size)) * (made["weight_scale"].float() / factor)[..., None]
        torch.testing.assert_close(ours.flatten(1), stands_for.float(), rtol=2**-7, atol=0)
        return made, ours.flatten(1)

    return pack


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """float32 [out, in] of uint8 [out, in / 2], by the definition: sign, two bits of exponent, one of mantissa."""
    halves = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).float()
    sign, rest = 1 - 2 * (halves >= 8).float(), halves % 8
    exponent, mantissa = (rest / 2).floor(), rest % 2
    return sign * torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2 ** (exponent - 1))


FP4: dict[str, dict[str, Any]] = {
    "nvfp4": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32},
}


def described_fp4(kind: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": FP4[kind], "format": f"{kind}-pack-quantized"}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def described(scheme: str) -> dict[str, Any]:
    from tests.checkpoint.test_packed import FORM
    from tests.checkpoint.test_packed import scheme as named

    found = FORM.describe([], {f"model.layers.0.{name}": named(scheme) for name in LINEARS}, {}).quantization_config
    assert found is not None
    return found


SOURCES: dict[str, tuple[Callable[..., Packed], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}),
    "gptq 8 bits": (
        lambda weight, seed: gptq(weight, seed, bits=8, shuffled=False),
        {"quant_method": "gptq", "bits": 8, "group_size": 32},
    ),
    "gptq v2": (
        lambda weight, seed: gptq(weight, seed, v2=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "w4a16": (compressed("w4a16-g32"), described("w4a16-g32")),
    "w8a16": (compressed("w8a16"), described("w8a16")),
    "fp8": (compressed("fp8-dynamic"), described("fp8-dynamic")),
    "nvfp4": (fp4("nvfp4"), described_fp4("nvfp4")),
    "mxfp4": (fp4("mxfp4"), described_fp4("mxfp4")),
}


@pytest.fixture(params=SOURCES)
def pair(request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model with packed linears, and the float32 model that it stands for."""
    pack, config = SOURCES[request.param]
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    for folder in (packed, plain):
        shutil.copytree(make_model("llama"), folder)
    if request.param.startswith(("gptq", "awq")):
        name = "quantize_config.json" if request.param.startswith("gptq") else "quant_config.json"
        (packed / name).write_text(json.dumps(config))
    tensors = {name: tensor.float() for name, tensor in load_file(plain / "model.safetensors").items()}
    stored: dict[str, torch.Tensor] = {}
    for seed, (name, tensor) in enumerate(list(tensors.items())):
        owner = name.removesuffix(".weight")
        if owner.rpartition(".")[2] in LINEARS:
            parts, tensors[name] = pack(tensor, seed)
            stored |= {f"{owner}.{part}": value for part, value in parts.items()}
        else:
            stored[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, plain / "model.safetensors")
    save_file(stored, packed / "model.safetensors")
    for folder, more in ((packed, {"quantization_config": config}), (plain, {})):
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | more | {"dtype": "float32"}))
    return packed, plain


def test_the_float_model_is_what_the_integers_stand_for(pair: tuple[Path, Path]) -> None:
    packed, plain = (FloatReader(Checkpoint.open(folder)) for folder in pair)
    assert sorted(packed.names) == sorted(plain.names)
    name = "model.layers.1.mlp.down_proj.weight"
    for each in plain.names:
        assert (packed.shape(each), packed.dtype(each)) == (plain.shape(each), plain.dtype(each))
        assert packed.nbytes(each) == plain.nbytes(each)
        torch.testing.assert_close(packed.tensor(each), plain.tensor(each), rtol=1e-6, atol=1e-9)
    rows = plain.rows(name, 3, 21)
    torch.testing.assert_close(packed.rows(name, 3, 21), rows, rtol=1e-6, atol=1e-9)
    with packed.holding([name]):
        torch.testing.assert_close(packed.rows(name, 3, 21), rows, rtol=1e-6, atol=1e-9)
    assert name in packed
    assert "model.layers.1.mlp.down_proj.scales" not in packed.names
    assert torch.equal(packed.gather(name, torch.tensor([5, 2])), packed.tensor(name)[[5, 2]])
    assert formats.of(packed.checkpoint).is_source(packed.checkpoint)
    assert summarize(packed.checkpoint)["layers"]


def test_it_is_quantized_like_the_float_model(pair: tuple[Path, Path], run_qtool: Callable[..., Any]) -> None:
    made = []
    for folder in pair:
        options = ("--scheme", "w8a8-dynamic", "--samples", "4", "--seq-len", "48", "--engine", "native")
        done = run_qtool("quantize", folder, *options, "--output", folder.with_name(f"{folder.name}-int8"))
        assert done.code == 0, done.stderr
        assert ("quantized already" in done.stderr) == (folder.name == "packed")
        made.append(folder.with_name(f"{folder.name}-int8"))
    found, expected = (load_file(folder / "model.safetensors") for folder in made)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.dtype == torch.int8:  # a rounding of the source may decide a tie
            assert (found[name] != tensor).float().mean() < 1e-3
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    assert not [*made[0].glob("quant*_config.json")]  # it would say that these are the old integers
    assert json.loads((made[0] / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"


WRONG: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "bits": ({"bits": 3}, {}, "3 bits can't be read"),
    "group size": ({"group_size": 0}, {}, "group_size 0 can't be read"),
    "other groups": ({"group_size": 16}, {}, "scales .* in groups of 16 doesn't fit"),
    "index": ({}, {"g_idx": torch.full((64,), 9, dtype=torch.int32)}, "g_idx"),
    "zeros": ({}, {"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, "qzeros"),
    "words": ({}, {"qweight": torch.zeros(8, 64, dtype=torch.int64)}, "qweight"),
    "scales": ({}, {"scales": torch.zeros(2, 60)}, "scales"),
    "nan": ({}, {"scales": torch.full((2, 64), float("nan"))}, "NaN"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_damage_is_named(wrong: str, tmp_path: Path) -> None:
    config, tensors, message = WRONG[wrong]
    parts, _ = gptq(torch.zeros(64, 64), 0)
    save_file({f"a.0.q.{part}": tensor for part, tensor in (parts | tensors).items()}, tmp_path / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32} | config
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(InputError, match=message):
        FloatReader(Checkpoint.open(tmp_path)).tensor("a.0.q.weight")


def test_other_versions_of_awq(tmp_path: Path) -> None:
    save_file({"a.0.q.qweight": torch.zeros(64, 8, dtype=torch.int32)}, tmp_path / "model.safetensors")
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(InputError, match="version 'gemv'"):
        FloatReader(Checkpoint.open(tmp_path)).shape("a.0.q.weight")


@pytest.mark.vllm
@pytest.mark.parametrize("bits", [4, 8])
def test_vllm_packs_alike(bits: int) -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack

    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (64, 96))
    ours = into_words(codes.T, bits, tuple(range(32 // bits))).t()
    assert torch.equal(gptq_pack(torch.from_numpy(codes), bits, 64, 96), ours)
    if bits == 4:
        assert torch.equal(awq_pack(torch.from_numpy(codes), 4, 64, 96), into_words(codes, 4, (0, 2, 4, 6, 1, 3, 5, 7)))


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("weight_scale", torch.zeros(8, 3, dtype=torch.uint8)),
        ("weight_scale", torch.zeros(8, 4)),
        ("weight_packed", torch.zeros(8, 32, dtype=torch.int8)),
        ("weight_packed", torch.zeros(8, 30, dtype=torch.uint8)),
    ],
)
def test_fp4_that_does_not_fit(part: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    tensors = {
        "weight_packed": torch.zeros(8, 32, dtype=torch.uint8),
        "weight_scale": torch.ones(8, 4).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    }
    tensors |= {part: tensor}
    save_file({f"a.0.q.{key}": value for key, value in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": described_fp4("nvfp4")}))
    with pytest.raises(InputError, match="don't fit FP4"):
        FloatReader(Checkpoint.open(tmp_path)).tensor("a.0.q.weight")
