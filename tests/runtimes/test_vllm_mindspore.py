"""vLLM-MindSpore: what it is told, and what its failures are called. It needs Ascend; what runs here is the real plugin
up to the first thing it misses, and MindSpore's own refusal of a device that isn't there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtool import runtimes
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.runtimes import launch, vllm_mindspore
from tests.managed import unpacked

PLUGIN = "vllm-mindspore==0.5.1"
REPOSITORY = Path(__file__).resolve().parents[2]
VARIABLE = "VLLM_MS_MODEL_BACKEND"


@pytest.fixture(scope="session")
def plugin() -> Path:
    """A folder with the real plugin and nothing that it depends on."""
    return unpacked(PLUGIN)


@pytest.fixture(scope="module")
def checkpoints(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path_factory: Any) -> dict[str, Path]:
    """golden-stick checkpoints: static; the same model with dynamic layers; and both as if of another architecture."""
    folder = tmp_path_factory.mktemp("golden")
    made = {}
    for name, scheme in (("static", "w8a8-static"), ("dynamic", "w8a8")):
        size = ("--samples", 2, "--seq-len", 32)
        options = ("--scheme", scheme, "--format", "golden-stick", "--engine", "native", *size)
        done = run_qtool("quantize", tiny_llama, "--output", folder / name, *options)
        assert done.code == 0, done.stderr
        made[name] = folder / name
        for other in ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"):
            copy = made[f"{other} {name}"] = Path(shutil.copytree(folder / name, folder / f"{other}-{name}"))
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**config, "architectures": [other]}))
    return made


def base() -> runtimes.Launch:
    return runtimes.Launch("vllm-mindspore", sys.executable, {"quantization": "golden-stick"}, {"X": "1"})


def test_the_plugin_is_imported_before_vllm(
    checkpoints: dict[str, Path], run_qtool: Callable[..., Any], golden_stick: dict[str, str], plugin: Path
) -> None:
    """The interpreter has MindSpore and the plugin, but neither msadapter nor vLLM: what is imported first, fails."""
    python = golden_stick["QTOOL_GOLDEN_STICK_PYTHON"]
    env = {"QTOOL_VLLM_MINDSPORE_PYTHON": python, "PYTHONPATH": f"{plugin}{os.pathsep}{REPOSITORY}"}
    done = run_qtool("generate", checkpoints["static"], "--prompt", "x", env=env)
    assert done.code == 2
    assert "needs msadapter, which is not installed" in done.stderr
    assert len(done.stderr[done.stderr.index("error:") :].splitlines()) <= 3
    assert done.stdout == ""


def test_without_the_plugin(checkpoints: dict[str, Path], run_qtool: Callable[..., Any], golden_stick: Any) -> None:
    env = {"QTOOL_VLLM_MINDSPORE_PYTHON": golden_stick["QTOOL_GOLDEN_STICK_PYTHON"]}
    done = run_qtool("generate", checkpoints["static"], "--prompt", "x", env=env)
    assert done.code == 2
    assert "not installed: vllm_mindspore" in done.stderr


def test_what_mindspore_says_without_cann(golden_stick: dict[str, str]) -> None:
    code = "import mindspore; mindspore.set_device('Ascend'); mindspore.Tensor([1.0]) + 1"
    python = golden_stick["QTOOL_GOLDEN_STICK_PYTHON"]
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    explained = vllm_mindspore.explain(RuntimeError(done.stderr.partition("RuntimeError: ")[2]))
    assert explained is not None
    assert "CANN" in explained.what
    assert explained.hint is not None
    assert "set_env.sh" in explained.hint


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ModuleNotFoundError("No module named 'msadapter'"), "msadapter"),
        (ModuleNotFoundError("No module named 'vllm'"), "not installed: vllm"),
        (ImportError("libascendcl.so: cannot open shared object file: No such file or directory"), "CANN"),
        # mindspore 2.7.1, run_check/_check_version.py
        (
            RuntimeError(
                "MindSpore version 2.7.1 and Ascend AI software package (Ascend Data Center Solution)version 7.3 does "
                "not match, the version info file path /usr/local/Ascend/latest/compiler/version.info"
            ),
            "don't fit together",
        ),
        (RuntimeError("Call aclrtGetDeviceCount failed, ret[507899]"), "no Ascend device"),
        (RuntimeError("drvGetDevNum failed, drvRetCode=7"), "no Ascend device"),
    ],
)
def test_failures_have_names(error: Exception, what: str) -> None:
    explained = vllm_mindspore.explain(error)
    assert explained is not None
    assert what in explained.what
    assert "{" not in explained.what
    wrapped = RuntimeError("Engine core initialization failed. See root cause above.")
    wrapped.__cause__ = error
    assert vllm_mindspore.explain(wrapped) is not None


def test_other_failures_keep_their_own_words() -> None:
    assert vllm_mindspore.explain(ValueError("a prompt is too long")) is None


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "native"),
        ("Qwen3ForCausalLM", "native"),
        ("DeepseekV3ForCausalLM", "mindformers"),
        ("Glm4MoeForCausalLM", "mindformers"),
        ("MistralForCausalLM", "mindone"),
    ],
)
def test_the_kind_of_model(architecture: str, expected: str) -> None:
    assert vllm_mindspore.backend({"architectures": [architecture]}) == expected


def test_the_native_architectures_are_the_plugins(plugin: Path) -> None:
    """Read from the plugin's own registry."""
    import ast

    tree = ast.parse((plugin / "vllm_mindspore/model_executor/models/registry.py").read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_NATIVE_MODELS"
    )
    assert set(ast.literal_eval(table)) == set(vllm_mindspore.NATIVE)


def test_a_static_checkpoint(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    adapted = vllm_mindspore.adapt(base(), Checkpoint.open(checkpoints["static"]))
    assert adapted.env == {"X": "1", VARIABLE: "native"}
    assert adapted.engine == {"quantization": "golden-stick"}
    monkeypatch.setenv(VARIABLE, "MindOne")
    with pytest.raises(InputError, match=f"{VARIABLE} is mindone"):
        vllm_mindspore.adapt(base(), Checkpoint.open(checkpoints["static"]))


def test_a_float_checkpoint(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert vllm_mindspore.adapt(base(), Checkpoint.open(tiny_llama)).env == {"X": "1", VARIABLE: "native"}
    monkeypatch.setenv(VARIABLE, "MindOne")
    assert vllm_mindspore.adapt(base(), Checkpoint.open(tiny_llama)).env[VARIABLE] == "mindone"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen2ForCausalLM static", "native"),
        ("Qwen3ForCausalLM static", "native"),
        ("DeepseekV3ForCausalLM static", "mindformers"),
        ("DeepseekV3ForCausalLM dynamic", "mindformers"),
    ],
)
def test_what_is_read(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert vllm_mindspore.adapt(base(), Checkpoint.open(checkpoints[name])).env[VARIABLE] == kind


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dynamic", "support them for LlamaForCausalLM"),
        ("Qwen2ForCausalLM dynamic", "ignores the quantization"),
        ("Qwen3ForCausalLM dynamic", "doesn't load their scales"),
        ("Qwen3MoeForCausalLM static", "ignores the quantization"),
    ],
)
def test_what_would_be_noise_is_refused(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(InputError, match=says) as caught:
        launch.adapted(base(), Checkpoint.open(checkpoints[name]))
    assert ("w8a8-static" in str(caught.value.hint)) == ("Moe" not in name)


def test_a_wrong_kind_is_refused(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "mindformers")
    assert vllm_mindspore.adapt(base(), Checkpoint.open(checkpoints["Qwen3ForCausalLM static"])).env == {
        "X": "1",
        VARIABLE: "mindformers",
    }
    for name in ("static", "Qwen2ForCausalLM static"):
        with pytest.raises(InputError, match=f"{VARIABLE} is mindformers.*those of native do"):
            vllm_mindspore.adapt(base(), Checkpoint.open(checkpoints[name]))
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(InputError, match=f"{VARIABLE} is native"):
        vllm_mindspore.adapt(base(), Checkpoint.open(checkpoints["DeepseekV3ForCausalLM dynamic"]))


@pytest.mark.parametrize("listed", [["b", "a"], ["a", "b"]])
def test_the_norm_of_the_layer_that_predicts_one_further(
    listed: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MindFormers loads it into the same parameter as the model's last norm: the file that is listed last counts."""
    folder = tmp_path / "deepseek"
    folder.mkdir()
    save_file({"model.layers.61.shared_head.norm.weight": torch.ones(4)}, folder / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(4)}, folder / "b.safetensors")
    where = {"model.layers.61.shared_head.norm.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(folder)
    names = [f"{name}.safetensors" for name in listed]
    monkeypatch.setattr(os, "listdir", lambda _: ["config.json", *names])
    last = {"a": "shared_head.norm", "b": "model.norm"}[listed[-1]]  # what MindFormers would end with
    if last == "model.norm":
        vllm_mindspore._check_final_norm(checkpoint)
        return
    with pytest.raises(InputError, match=r"in place of model\.norm\.weight"):
        vllm_mindspore._check_final_norm(checkpoint)
