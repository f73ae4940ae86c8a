"""Quantized keys and values: from the engine's files to the logits that other implementations compute with them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qtool import runtimes
from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.environments import machine
from qtool.errors import InputError
from qtool.jobs.evaluate import vllm_for
from qtool.model.decoder import DecoderStream
from qtool.recipe.load import load as load_recipe
from qtool.runtimes import settings
from qtool.runtimes.launch import Launch
from qtool.scheme import named
from tests import families
from tests.fake_quantized import FakeQuantized
from tests.managed import REPOSITORY

FORMATS = {"fp8": "compressed-tensors", "int8": "modelslim"}
IDS = torch.randint(4, 500, (1, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    return make_model("qwen3", seed=5)


@pytest.fixture(scope="module", params=FORMATS)
def made(request: pytest.FixtureRequest, source: Path, quantize: Any, tmp_path_factory: Any) -> tuple[str, Path, Path]:
    """(the cache, a checkpoint with it, the same without)."""
    folder = tmp_path_factory.mktemp("cache")
    quantize(source, folder / "with", format=FORMATS[request.param], kv_cache=request.param)
    quantize(source, folder / "without", format=FORMATS[request.param])
    return request.param, folder / "with", folder / "without"


def ours(folder: Path) -> torch.Tensor:
    """Logits of `qtool eval`."""
    stream = DecoderStream(Checkpoint.open(folder), dtype=torch.float32)
    with torch.no_grad():
        batch = stream.prologue(IDS)
        for index in range(stream.depth):
            with stream.layer(index) as layer:
                batch = stream.run(index, layer, batch)
        hidden = stream.head.leaving(batch)[0]
        return stream.head.logits(hidden, stream.head.rows(0, stream.head.vocabulary))


def by_transformers(folder: Path, source: Path, cache: str) -> torch.Tensor:
    """fp8: compressed-tensors' own cache. int8: vllm-ascend's formula in numpy, in transformers' cache."""
    from transformers import AutoModelForCausalLM, DynamicCache

    if cache == "fp8":
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            return model(IDS).logits[0]
    tensors = {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}

    def kept(x: torch.Tensor, name: str) -> torch.Tensor:
        scale, offset = (tensors[f"{name}.kv_cache_{part}"].numpy().astype(np.float32) for part in ("scale", "offset"))
        flat = x.transpose(1, 2).flatten(2).numpy()
        q = np.clip(np.round(flat / scale + offset), -128, 127).astype(np.int8)
        dequantized = (q.astype(np.float32) - offset) * scale
        return torch.from_numpy(dequantized).unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)

    class Kept(DynamicCache):
        def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            name = f"model.layers.{layer_idx}.self_attn"
            return super().update(kept(keys, f"{name}.k_proj"), kept(values, f"{name}.v_proj"), layer_idx)

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    checkpoint = Checkpoint.open(folder)
    form = formats.of(checkpoint)
    for name, parameter in model.named_parameters():
        if name in tensors and parameter.ndim == 1:
            parameter.data.copy_(tensors[name])
    for name in form.layers(checkpoint):
        if (linear := form.read_linear(checkpoint, name)) is not None:
            model.set_submodule(name, FakeQuantized(linear))
    with torch.no_grad():
        return model(IDS, past_key_values=Kept(config=model.config)).logits[0]


def test_eval_computes_what_others_do(made: tuple[str, Path, Path], source: Path) -> None:
    cache, folder, without = made
    found, expected = ours(folder), by_transformers(folder, source, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    plain = ours(without)
    assert 1e-3 < float((found - plain).norm() / plain.norm()) < 0.1  # the cache shows


# What each format has besides, with every scheme that it can hold beside such a cache.
OTHERS = {
    "fp8": ("w8a8", "w8a8-asymmetric", "w8a16", "w4a16-g64", "w4a8-g64", "fp8-dynamic", "fp8-block"),
    "int8": ("w8a8", "w4a8-g64"),
}


@pytest.fixture(scope="module")
def wide(make_model: Callable[..., Path]) -> Path:
    """Its matrices have several groups of 64, and blocks of 128 x 128."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8}
    return make_model("qwen3", seed=7, name="wide", **sizes)


@pytest.mark.parametrize(("cache", "scheme"), [(cache, each) for cache, found in OTHERS.items() for each in found])
def test_with_every_scheme(
    wide: Path, quantize: Any, run_qtool: Callable[..., Any], tmp_path: Path, cache: str, scheme: str
) -> None:
    """eval computes with both what others do, and inspect tells both."""
    recipe = load_recipe("default").with_scheme(scheme) or load_recipe("default")
    schemes = recipe.model_dump(mode="json")["schemes"]
    quantize(wide, tmp_path / "made", scheme=scheme, schemes=schemes, format=FORMATS[cache], kv_cache=cache)
    found, expected = ours(tmp_path / "made"), by_transformers(tmp_path / "made", wide, cache)
    # A tie that rounds the other way moves some of what comes after it: far less than quantizing does.
    assert float((found - expected).norm()) < 0.25 * float((expected - ours(wide)).norm())
    shown = json.loads(run_qtool("inspect", tmp_path / "made", "--json").stdout)
    wanted = named(scheme)
    assert wanted is not None
    assert shown["kv_cache"] == cache
    assert {row["scheme"] for row in shown["layers"] if ".self_attn." in row["layers"]} == {wanted.label}


def test_nothing_else_changes(made: tuple[str, Path, Path]) -> None:
    _, *folders = made
    ours, others = (
        {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
        for folder in folders
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in others.items())
    assert len(ours) == len(others) + {"fp8": 4, "int8": 8}[made[0]]


def test_scales_hold_what_the_smoothed_model_puts_there(source: Path, quantize: Any, tmp_path: Path) -> None:
    """Smoothing folds a scale into v_proj: values are calibrated as they are after that."""
    from transformers import AutoModelForCausalLM, DynamicCache

    from qtool.calibration.text import load
    from qtool.calibration.tokenizer import load_tokenizer

    quantize(source, tmp_path / "made", format="modelslim", kv_cache="int8")
    checkpoint = Checkpoint.open(tmp_path / "made")
    form = formats.of(checkpoint)
    report = json.loads((tmp_path / "made" / "qtool.json").read_text())
    assert any(group["linears"] == ["self_attn.o_proj"] and group["alpha"] for group in report["layers"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name in form.layers(checkpoint):
        linear = form.read_linear(checkpoint, name)
        if linear is not None:
            model.get_parameter(f"{name}.weight").data.copy_(linear.dequantize())
    for name, parameter in model.named_parameters():
        if name in checkpoint and parameter.ndim == 1:
            parameter.data.copy_(checkpoint.tensor(name))
    ids = load("builtin", load_tokenizer(source, trust_remote_code=False), samples=8, seq_len=64, seed=0).ids
    seen = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=seen)
    for index, layer in enumerate(seen.layers):
        cache = form.read_cache(checkpoint, f"model.layers.{index}.self_attn")
        assert cache is not None
        for x, scales in ((layer.keys, cache.keys), (layer.values, cache.values)):
            flat = x.transpose(1, 2).flatten(0, 1).flatten(1)
            expected = (flat.amax(0).clamp(min=0) - flat.amin(0).clamp(max=0)) / 255
            # bfloat16 and the rounding of weights move it a little; without the fold, factors of 2 and more
            assert float((scales.scale / expected).log().abs().max()) < 0.1


def test_what_the_files_say(made: tuple[str, Path, Path], run_qtool: Callable[..., Any]) -> None:
    cache, folder, without = made
    shown, plain = (json.loads(run_qtool("inspect", each, "--json").stdout) for each in (folder, without))
    assert (shown["kv_cache"], plain["kv_cache"]) == (cache, None)
    assert shown["parameters"] == plain["parameters"]
    if cache == "fp8":
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
        assert config["kv_cache_scheme"] == args
    else:
        description = json.loads((folder / "quant_model_description.json").read_text())
        assert description["kv_cache_type"] == "C8"


@pytest.mark.parametrize("target", ["bfloat16", "golden-stick"])
def test_converting(made: tuple[str, Path, Path], target: str, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    cache, folder, _ = made
    done = run_qtool("convert", folder, "--to", target, "--output", tmp_path / "made")
    if target == "bfloat16":
        assert done.code == 0, done.stderr
        assert f"keys and values are kept as floats, not as {cache}" in done.stderr
        assert not any("scale" in name for name in Checkpoint.open(tmp_path / "made").names)
    else:
        assert done.code == 2
        assert f"keys and values are kept as {cache}, which is not converted" in done.stderr
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--kv-cache", "int8"), "compressed-tensors can't say that keys and values are kept as int8"),
        (("--kv-cache", "int8", "--format", "golden-stick"), "golden-stick can't say that keys and values"),
        (("--kv-cache", "fp8", "--format", "modelslim"), "modelslim can't say that keys and values are kept as fp8"),
        (("--kv-cache", "fp8", "--engine", "golden-stick"), "mindspore-gs quantizes keys and values"),
    ],
)
def test_what_a_format_or_an_engine_does_not_take(
    source: Path, options: tuple[str, ...], says: str, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    done = run_qtool("quantize", source, "--output", tmp_path / "made", "--dry-run", *options)
    assert done.code == 2
    assert says in " ".join(done.stderr.split())


def test_latents_are_refused(tiny_tokenizer: Any, quantize: Any, tmp_path: Path) -> None:
    """DeepSeek's cache keeps latents, which transformers' doesn't show."""
    model = families.make(tmp_path / "deepseek", "deepseek_v3", tiny_tokenizer)
    with pytest.raises(InputError, match="hands no keys and values to a cache"):
        quantize(model, tmp_path / "made", kv_cache="fp8")


def test_a_cache_of_another_kind(made: tuple[str, Path, Path], run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    """inspect says so, eval doesn't guess."""
    cache, folder, _ = made
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    if cache == "fp8":
        config = json.loads((other / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
        (other / "config.json").write_text(json.dumps(config))
    else:
        file = other / "quant_model_description.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"kv_cache_type": "C4"}))
    assert json.loads(run_qtool("inspect", other, "--json").stdout)["kv_cache"] == "unknown"
    with pytest.raises(InputError, match="keys and values are quantized"):
        ours(other)


def test_a_quantized_source_loses_its_cache(make_model: Callable[..., Path], quantize: Any, tmp_path: Path) -> None:
    """Scales that somebody calibrated on another model's keys don't get into the new one."""
    wide = make_model("qwen3", seed=6, hidden_size=128, intermediate_size=128, head_dim=32)
    from qtool.recipe.load import load

    recipe = load("default").with_scheme("fp8-dynamic")
    assert recipe is not None
    schemes = {"fp8-dynamic": [each.model_dump(mode="json") for each in recipe.schemes["fp8-dynamic"]]}
    both = {"schemes": load("default").model_dump(mode="json")["schemes"] | schemes}
    quantize(wide, tmp_path / "first", scheme="fp8-dynamic", kv_cache="fp8", **both)
    quantize(tmp_path / "first", tmp_path / "second")
    names = Checkpoint.open(tmp_path / "second").names
    assert not any(name.endswith(("k_scale", "v_scale")) for name in names)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] is None


def test_damaged_scales(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cache, folder, _ = made
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.self_attn." + ("v_scale" if cache == "fp8" else "v_proj.kv_cache_offset")
    tensors[name] = torch.full_like(tensors[name], 0.0 if cache == "fp8" else 300.0)
    save_file(tensors, file)
    with pytest.raises(InputError, match="v_scale holds" if cache == "fp8" else "kv_cache_offset holds"):
        ours(other)


def test_the_journal_tells_jobs_apart(source: Path) -> None:
    """What decides about the bytes is in the key that a resumed job is known by."""
    from qtool.engines.native.context import Setup
    from qtool.scheme import CACHES

    setup = Setup("", torch.float32, "cpu", False, "compressed-tensors", 1)
    keys = [json.dumps(dataclasses.replace(setup, cache=each).decisive) for each in (None, *CACHES.values())]
    assert len(set(keys)) == 3


IN_VLLM = """
import json, sys
from qtool.workers import hide_media_packages
hide_media_packages()
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention.attention import Attention

def kept(model):
    layers = (each for each in model.modules() if isinstance(each, Attention))
    return [[each.kv_cache_dtype, each._k_scale_float, each._v_scale_float] for each in layers]

llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=1 << 24,
          skip_tokenizer_init=True, max_num_seqs=1)
(layers,) = llm.apply_model(kept)
parameters = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
(answer,) = llm.generate([{"prompt_token_ids": list(range(4, 20))}], parameters, use_tqdm=False)
print(json.dumps({"layers": layers, "ids": list(answer.outputs[0].token_ids)}))
"""


@pytest.mark.vllm
@pytest.mark.skipif("avx512f" not in machine.cpu_flags(), reason="vLLM's FP8 cache on CPUs is for AVX-512")
def test_vllm_keeps_them_so(source: Path, quantize: Any, tmp_path: Path) -> None:
    """On a CPU: its cache is of fp8 with the scales of the files, and it generates."""
    quantize(source, tmp_path / "made", kv_cache="fp8")
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", IN_VLLM, str(tmp_path / "made")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    checkpoint = Checkpoint.open(tmp_path / "made")
    assert len(found["ids"]) == 8
    for index, (dtype, *scales) in enumerate(found["layers"]):
        assert dtype.startswith("fp8")
        names = (f"model.layers.{index}.self_attn.{part}_scale" for part in "kv")
        assert scales == [float(checkpoint.tensor(name)) for name in names]


@pytest.mark.parametrize(
    ("flags", "head", "why"),
    [
        ("avx2 avx512f", 32, None),
        ("avx2", 32, "where the processor has AVX-512"),
        ("avx2 avx512f amx_tile", 80, "for heads whose size is a multiple of 32 (here 80)"),
    ],
)
def test_vllm_is_told_to_keep_floats_where_it_must(
    make_model: Callable[..., Path],
    quantize: Any,
    tmp_path: Path,
    flags: str,
    head: int,
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize(make_model("qwen3", seed=5, head_dim=head, name=f"of-{head}"), tmp_path / "made", kv_cache="fp8")
    monkeypatch.setattr(machine, "cpu_flags", lambda: set(flags.split()))
    checkpoint = Checkpoint.open(tmp_path / "made")
    found = runtimes.adapted(Launch("vllm", sys.executable), checkpoint)
    assert (found.otherwise or "").endswith(why or "")
    if why is None:
        assert (found.otherwise, found.engine) == (None, {})
        return
    kept = found.engine["hf_overrides"]["quantization_config"]
    assert kept == checkpoint.config["quantization_config"] | {"kv_cache_scheme": None}
    with pytest.raises(InputError, match="stay floats") as error:
        vllm_for(checkpoint)
    assert "Leave out --runtime" in (error.value.hint or "")


@pytest.mark.vllm
def test_vllm_generates_with_floats_where_it_must(
    make_model: Callable[..., Path], quantize: Any, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    """Heads of 80, which no CPU keeps in FP8: the answer is that of the model whose keys and values are floats."""
    source = make_model("qwen3", seed=5, head_dim=80, name="of-80")
    quantize(source, tmp_path / "with", kv_cache="fp8")
    quantize(source, tmp_path / "without")
    asked = ("--runtime", "vllm", "--prompt", "one two three", "--max-tokens", "8", "--raw", "--json")
    with_cache, without = (run_qtool("generate", tmp_path / name, *asked) for name in ("with", "without"))
    assert (with_cache.code, without.code) == (0, 0), with_cache.stderr
    assert "keys and values stay floats, not FP8" in with_cache.stderr
    assert "stay floats" not in without.stderr
    assert json.loads(with_cache.stdout)["text"] == json.loads(without.stdout)["text"] != ""


def test_a_cache_of_another_dtype_than_the_model(source: Path, run_qtool: Callable[..., Any]) -> None:
    """vLLM on CPUs reads one as the other, and answers with noise."""
    asked = ("generate", source, "--runtime", "vllm", "--prompt", "x", "--set", "kv_cache_dtype=bfloat16")
    done = run_qtool(*asked, "--set", "dtype=float32")
    assert done.code == 2
    assert "noise" in done.stderr
    assert "--set dtype=bfloat16" in done.stderr
    checkpoint = Checkpoint.open(source)
    assert settings.dtype(checkpoint, "cpu", {"kv_cache_dtype": "float16"}) == "float16"
    assert settings.dtype(checkpoint, "cuda", {"kv_cache_dtype": "float16", "dtype": "float32"}) == "float32"
    assert settings.dtype(checkpoint, "cpu", {"kv_cache_dtype": "fp8", "dtype": "half"}) == "float16"
