"""The real mindspore-gs on this CPU, through the command line, and the native engine's exact mode beside it.

Nothing of mindspore-gs is replaced but what MindSpore's CPU backend lacks (qtool/engines/golden_stick/cpu.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

SAMPLES, LENGTH = 2, 48
SIZE = ("--samples", SAMPLES, "--seq-len", LENGTH)
STATIC: list[dict[str, Any]] = [
    {"layers": "lm_head", "quantize": False},
    {"layers": ".*", "activations": {"mode": "static"}, "rounding": "nearest"},
]
# The shape that Golden Stick's example gives to DeepSeek-V3; two patterns match an attention layer: the first counts.
DEEPSEEK: list[dict[str, Any]] = [
    {"layers": "lm_head", "quantize": False},
    {"layers": r".*\.self_attn\..*", "activations": {"mode": "static"}, "rounding": "nearest"},
    {"layers": r".*\.layers\.0\.mlp\.down_proj", "quantize": False},
    {"layers": r".*\.(mlp|self_attn)\..*", "smoothing": "none", "clip": False, "rounding": "nearest"},
]


@dataclass(frozen=True)
class Kind:
    """A tiny model, the scheme it is quantized with, and its dtype."""

    model_type: str
    config: dict[str, Any]
    seed: int
    scheme: list[dict[str, Any]]
    float32: bool = True


KINDS = {
    "llama with grouped queries": Kind("llama", {}, 0, STATIC),
    "qwen3 without": Kind("qwen3", {"num_key_value_heads": 4, "num_hidden_layers": 1}, 1, STATIC),
    "llama, mixed, bfloat16": Kind("llama", {"attention_bias": True}, 2, DEEPSEEK, float32=False),
}
# Nothing that Golden Stick would search for.
QUICK: list[dict[str, Any]] = [{"layers": r".*\.mlp\.(up|gate)_proj", "smoothing": "none", "clip": False}]
FLOAT32 = [name for name, kind in KINDS.items() if kind.float32]


@dataclass(frozen=True)
class Pair:
    """One model quantized by both engines, and a folder to work in."""

    kind: Kind
    folder: Path
    model: Path
    native: Path
    golden: Path
    said: str

    def report(self, engine: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / engine / "qtool.json").read_text()))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def recipe(folder: Path, scheme: list[dict[str, Any]]) -> Path:
    file = folder / "recipe.yaml"
    content = {"name": "mine", "description": "", "osl": "exact", "schemes": {"w8a8": scheme}}
    file.write_text(json.dumps({**content, "export": {"format": "golden-stick"}}))
    return file


def in_float32(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    weights = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return target


@pytest.fixture(scope="module")
def pairs(
    make_model: Callable[..., Path],
    run_qtool: Callable[..., Any],
    golden_stick: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Pair]:
    """pairs(name of a kind) -> that model through both engines, once."""
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        from qtool.calibration.text import _shuffled, _topics

        if name in made:
            return made[name]
        kind, folder = KINDS[name], tmp_path_factory.mktemp("golden")
        source = make_model(kind.model_type, name=f"golden-{kind.model_type}", seed=kind.seed, **kind.config)
        model = in_float32(source, folder / "model") if kind.float32 else source
        said, text = "", folder / "help.txt"
        # The topics of Python's help alone, on which no two alphas of any kind tie.
        text.write_text("\n\n".join(_shuffled(_topics()[0], seed=0)), encoding="utf-8")
        for engine in ("native", "golden-stick"):
            arguments = ("--recipe", recipe(folder, kind.scheme), "--engine", engine, "--calibration", text, *SIZE)
            done = run_qtool("quantize", model, "--output", folder / engine, *arguments, env=golden_stick)
            assert done.code == 0, done.stderr
            assert done.stdout == f"{folder / engine}\n"
            said = done.stderr
        made[name] = Pair(kind, folder, model, folder / "native", folder / "golden-stick", said)
        return made[name]

    return make


@pytest.mark.parametrize("name", FLOAT32)
def test_the_native_engine_chooses_the_same_alphas(pairs: Callable[[str], Pair], name: str) -> None:
    ours, theirs = (
        [(row["layer"], row["linears"], row["alpha"]) for row in pairs(name).report(engine)["layers"]]
        for engine in ("native", "golden-stick")
    )
    assert ours == theirs
    assert len({alpha for *_, alpha in ours}) > 2  # a search, not a constant


@pytest.mark.parametrize("name", FLOAT32)
def test_the_native_engine_makes_the_same_checkpoint(pairs: Callable[[str], Pair], name: str) -> None:
    pair = pairs(name)
    ours, theirs = tensors(pair.native), tensors(pair.golden)
    assert ours.keys() == theirs.keys()
    equal = total = 0
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
        if tensor.dtype == torch.int8 and key.endswith(".weight"):
            # Rows between two clip ratios whose errors tie to float32's last digits may take the other ratio.
            equal += int((ours[key] == tensor).sum())
            total += tensor.numel()
            assert (ours[key].int() - tensor.int()).abs().max() <= 1, key
        elif key.endswith(("input_offset", "weight_offset")):
            assert torch.equal(ours[key], tensor), key
        elif not key.endswith("quant_bias"):  # follows from weights and offset
            torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=0, msg=key)
    assert equal / total > 0.999


@pytest.mark.parametrize("name", KINDS)
def test_both_engines_leave_the_same_files(pairs: Callable[[str], Pair], name: str) -> None:
    pair = pairs(name)
    ours, theirs = ({file.name for file in folder.iterdir()} for folder in (pair.native, pair.golden))
    assert ours == theirs
    for file in ("quantization_description.json", "config.json", "tokenizer.json"):
        assert json.loads((pair.native / file).read_text()) == json.loads((pair.golden / file).read_text())
    native, golden = pair.report("native"), pair.report("golden-stick")
    assert native["calibration"] == golden["calibration"]
    assert golden["engine"] == "golden-stick"
    assert golden["versions"]["mindspore_gs"] == "1.4.1"
    # A native report is the same however often its run was killed, so it holds no times; but it names its threads.
    assert golden.keys() - {"seconds", "peak_memory_bytes"} == native.keys() - {
        "mean_relative_error",
        "threads",
        "left_float",
    }


def test_the_first_policy_that_matches_counts(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("llama, mixed, bfloat16")
    types = json.loads((pair.golden / "quantization_description.json").read_text())
    for layer in (0, 1):
        prefix = f"model.layers.{layer}"
        assert types[f"{prefix}.self_attn.q_proj.weight"] == types[f"{prefix}.self_attn.q_proj.bias"] == "W8A8"
        assert types[f"{prefix}.mlp.up_proj.weight"] == "W8A8_DYNAMIC"
    assert types["model.layers.0.mlp.down_proj.weight"] == types["lm_head.weight"] == "FLOAT"
    assert types["model.layers.1.mlp.down_proj.weight"] == "W8A8_DYNAMIC"
    rows = pair.report("golden-stick")["layers"]
    assert [row["alpha"] is None for row in rows] == [False, False, True, False, False, True, True]


def test_a_bfloat16_model_stays_one(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("llama, mixed, bfloat16")
    source, golden = tensors(pair.model), tensors(pair.golden)
    kept = [name for name in source if name in golden and golden[name].dtype != torch.int8]
    assert {golden[name].dtype for name in kept} == {torch.bfloat16}
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        assert torch.equal(source[name], golden[name])
    # Each row's scale comes from its own largest weight, which no smoothing touched here.
    scale = source["model.layers.1.mlp.down_proj.weight"].float().abs().amax(1) * 2 / 255
    torch.testing.assert_close(golden["model.layers.1.mlp.down_proj.weight_scale"], scale)


def test_its_result_converts_to_another_format(
    pairs: Callable[[str], Pair], run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    """And back again: exactly what mindspore-gs wrote, every tensor and its description."""
    pair = pairs("llama with grouped queries")
    for source, target in ((pair.golden, "compressed-tensors"), (tmp_path / "compressed-tensors", "golden-stick")):
        done = run_qtool("convert", source, "--to", target, "--output", tmp_path / target)
        assert (done.code, done.stdout) == (0, f"{tmp_path / target}\n"), done.stderr
    back, theirs = tensors(tmp_path / "golden-stick"), tensors(pair.golden)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
    file = "quantization_description.json"
    assert json.loads((tmp_path / "golden-stick" / file).read_text()) == json.loads((pair.golden / file).read_text())
    inspected, original = (
        json.loads(run_qtool("inspect", folder, "--json").stdout)
        for folder in (tmp_path / "compressed-tensors", pair.golden)
    )
    assert inspected["format"] == "compressed-tensors"
    assert inspected["layers"] == original["layers"]


def test_it_says_what_it_does_differently(pairs: Callable[[str], Pair], run_qtool: Callable[..., Any]) -> None:
    pair = pairs("llama with grouped queries")
    done = run_qtool("quantize", pair.model, "--engine", "golden-stick", "--dry-run", "--recipe", "default")
    assert done.code == 0, done.stderr
    assert "`rounding: gptq` has no effect" in done.stderr
    assert "engine golden-stick (as asked for)" in done.stderr
    assert "mlp.down_proj" in done.stderr
    assert "warning" not in pair.said


def test_another_format_can_be_asked_for(
    pairs: Callable[[str], Pair], run_qtool: Callable[..., Any], golden_stick: dict[str, str], tmp_path: Path
) -> None:
    model = pairs("llama, mixed, bfloat16").model
    arguments = ("--recipe", recipe(tmp_path, QUICK), "--format", "compressed-tensors", *SIZE)
    done = run_qtool(
        "quantize", model, "--output", tmp_path / "out", "--engine", "golden-stick", *arguments, env=golden_stick
    )
    assert done.code == 0, done.stderr
    weight = tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].float()
    scale = tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight_scale"].float()
    original = tensors(model)["model.layers.0.mlp.up_proj.weight"].float()
    assert ((weight * scale - original).abs() <= scale * 0.5001).all()


# ------------------------------------------------------------ the other way round


@pytest.mark.parametrize("name", FLOAT32)
def test_mindspore_gs_runs_what_the_native_engine_made(
    pairs: Callable[[str], Pair],
    run_qtool: Callable[..., Any],
    golden_stick: dict[str, str],
    tmp_path: Path,
    name: str,
) -> None:
    """In mindspore-gs's own fake-quantized network, which keeps a static layer's input scale and offset as one number
    and derives deq_scale and quant_bias: so what deployment repeats or adds is taken off, nothing else.

    On the way there it was a compressed-tensors checkpoint, so that this is what `qtool convert` makes, too."""
    from qtool.checkpoint.reader import Checkpoint
    from qtool.engines.golden_stick import config, view
    from qtool.model.decoder import DecoderStream
    from qtool.recipe.schema import Recipe

    pair = pairs(name)
    for source, target in ((pair.native, "compressed-tensors"), (tmp_path / "compressed-tensors", "golden-stick")):
        assert run_qtool("convert", source, "--to", target, "--output", tmp_path / target).code == 0
    deployed, given = tensors(tmp_path / "golden-stick"), {}
    for key, tensor in deployed.items():
        if key.endswith((".input_scale", ".input_offset")):
            assert (tensor == tensor[0]).all()
            given[key] = tensor[:1].to(torch.float32 if key.endswith("scale") else torch.int32)
        elif not key.endswith((".deq_scale", ".quant_bias")):
            given[key] = tensor
    (tmp_path / "quantized").mkdir()
    save_file(given, tmp_path / "quantized" / "quantized.safetensors")
    chosen = Recipe.model_validate(json.loads((pair.native / "qtool.json").read_text())["recipe"])
    ids = torch.randint(512, (1, 24), generator=torch.Generator().manual_seed(7))
    job = {
        "model": str(view.make(Checkpoint.open(pair.model), tmp_path / "model")),
        "policies": [asdict(config.layer_policy(policy)) for policy in chosen.schemes["w8a8"]],
        "quantized": str(tmp_path / "quantized"),
        "ids": ids.tolist(),
        "logits": str(tmp_path / "logits.npy"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [golden_stick["QTOOL_GOLDEN_STICK_PYTHON"], Path(__file__).with_name("_fake_quant.py"), tmp_path / "job.json"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "GLOG_v": "3"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"missing": [], "unexpected": [], "given": len(given)}

    import numpy as np

    stream = DecoderStream(Checkpoint.open(pair.native), dtype=torch.float32)
    hidden = stream.prologue(ids)
    for index in range(stream.depth):
        with stream.layer(index) as layer:
            hidden = stream.run(index, layer, hidden)
    expected = stream.head.logits(stream.head.leaving(hidden)[0], stream.head.rows(0, stream.head.vocabulary))
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))[0]
    # A value on the edge between two integers may fall to either side: a step of one scale somewhere, no more.
    assert (logits - expected).abs().median() < 1e-4
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


# ------------------------------------------------------------ what can go wrong


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def group_is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def start(
    environment: dict[str, str],
    model: Path,
    folder: Path,
    *,
    scheme: list[dict[str, Any]] = STATIC,
    prepare: str = "",
    samples: int = 1,
) -> subprocess.Popen[str]:
    code = f"{prepare}\nfrom qtool.__main__ import main\nmain()"
    arguments = ["quantize", model, "--output", folder / "out", "--engine", "golden-stick"]
    arguments += ["--recipe", recipe(folder, scheme), "--samples", samples, "--seq-len", 16]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def small(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", num_hidden_layers=1, name="golden-small")


def test_a_worker_killed_in_mid_calibration(
    small: Path, qtool_environment: dict[str, str], golden_stick: dict[str, str], tmp_path: Path
) -> None:
    process = start({**qtool_environment, **golden_stick}, small, tmp_path, samples=64)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("quantize"):
            break
    (worker,) = workers_of(process)
    os.kill(worker, signal.SIGKILL)
    rest = process.stderr.read()
    assert process.wait(30) == 1
    assert "killed by signal 9" in rest
    assert re.search(r"\S+\.log", rest)
    assert group_is_gone(worker)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_disk_that_fills_up_while_mindspore_gs_saves(
    small: Path, qtool_environment: dict[str, str], golden_stick: dict[str, str], tmp_path: Path
) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    process = start({**qtool_environment, **golden_stick}, small, tmp_path, scheme=QUICK, prepare=limit)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "no space left" in errors
    assert "nothing was left behind" in errors
    assert len(errors[errors.index("error:") :].splitlines()) <= 3
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_no_interpreter_for_it(small: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    for named in ("", str(tmp_path / "nowhere" / "python")):
        done = run_qtool(
            "quantize", small, "-o", tmp_path / "out", "--engine", "golden-stick",
            env={"QTOOL_GOLDEN_STICK_PYTHON": named},
        )  # fmt: skip
        assert done.code == 2
        assert "QTOOL_GOLDEN_STICK_PYTHON" in done.stderr
        assert done.stdout == ""
        assert not any(tmp_path.iterdir())


def test_a_model_that_it_does_not_know(make_model: Callable[..., Path], run_qtool: Callable[..., Any]) -> None:
    model = make_model("gemma2", query_pre_attn_scalar=32, name="golden-gemma")
    done = run_qtool("quantize", model, "--engine", "golden-stick", "--dry-run")
    assert done.code == 2
    assert "model_type 'gemma2'" in done.stderr
    assert "--engine native" in done.stderr
