"""What is said of the runtimes, against their own sources."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qtool import runtimes
from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.engines import plan
from qtool.environments.table import ENGINES
from qtool.errors import InputError
from qtool.recipe.load import load
from qtool.runtimes import facts, vllm_ascend, vllm_mindspore
from qtool.runtimes.description import Quantized
from qtool.scheme import W8A8, W8A8_ASYMMETRIC, W8A8_DYNAMIC, Scheme
from tests.managed import VLLM_ASCEND, unpacked

QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
QWEN3_VL_MOE = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
GLM4_MOE = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"}
DEEPSEEK = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
TELECHAT2 = {"architectures": ["TeleChat2ForCausalLM"], "model_type": "telechat"}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
Q_PROJ, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.up_proj"


def test_every_format_has_readers() -> None:
    for format in (*formats.NAMES, "float"):
        assert runtimes.readers(format)
    named = [runtime.name for runtime in runtimes.RUNTIMES]
    assert len(set(named)) == len(named)
    assert ("auto", *named) == runtimes.NAMES
    assert set(named) == {name for name, engine in ENGINES.items() if engine.kind == "runtime"}


def test_who_reads_what() -> None:
    assert runtimes.read_by("compressed-tensors") == "vLLM, transformers and vllm-ascend"
    assert runtimes.read_by("golden-stick") == "vLLM-MindSpore"
    assert runtimes.read_by("modelslim") == "vllm-ascend and MindIE"
    assert [runtime.name for runtime in runtimes.readers("awq")] == ["vllm", "transformers"]
    with pytest.raises(InputError, match="unknown runtime 'mlx'"):
        runtimes.get("mlx")


@pytest.mark.parametrize(
    ("format", "config", "schemes", "dtype", "says", "fatal", "unread"),
    [
        ("golden-stick", QWEN3, {Q_PROJ: W8A8, EXPERT: None}, "BF16", None, False, False),
        ("golden-stick", QWEN3, {Q_PROJ: W8A8, EXPERT: W8A8_DYNAMIC}, "BF16", "doesn't load their scales", True, False),
        ("golden-stick", QWEN2, {Q_PROJ: W8A8}, "BF16", "VLLM_MS_MODEL_BACKEND=native", False, False),
        ("golden-stick", QWEN2, {Q_PROJ: W8A8_DYNAMIC}, "BF16", "ignores the quantization", True, False),
        ("golden-stick", QWEN3_MOE, {Q_PROJ: W8A8, EXPERT: None}, "BF16", "ignores the quantization", True, False),
        ("golden-stick", GLM4_MOE, {Q_PROJ: W8A8}, "BF16", "ignores the quantization", True, False),
        ("golden-stick", QWEN3_VL_MOE, {Q_PROJ: W8A8}, "BF16", "doesn't load for Qwen3VLMoe", False, True),
        ("golden-stick", DEEPSEEK, {Q_PROJ: W8A8, EXPERT: W8A8_DYNAMIC}, "BF16", None, False, False),
        ("golden-stick", MIXTRAL, {Q_PROJ: W8A8}, "BF16", "doesn't load for MixtralForCausalLM", False, True),
        ("golden-stick", LLAMA, {Q_PROJ: W8A8_DYNAMIC}, "BF16", "support them for LlamaForCausalLM", False, True),
        ("golden-stick", TELECHAT2, {Q_PROJ: W8A8}, "BF16", "doesn't load its key_value", True, False),
        ("golden-stick", TELECHAT2, {Q_PROJ: W8A8_DYNAMIC}, "BF16", "doesn't load its key_value", True, False),
        ("float", TELECHAT2, {Q_PROJ: None}, "BF16", "doesn't load its key_value", True, False),
        ("float", GLM4_MOE, {Q_PROJ: None}, "BF16", None, False, False),
        ("float", GLM4_MOE | {"use_qk_norm": True}, {Q_PROJ: None}, "BF16", "(use_qk_norm)", True, False),
        ("golden-stick", {}, {Q_PROJ: W8A8_DYNAMIC}, None, "doesn't load for this model", False, True),
        ("modelslim", LLAMA, {Q_PROJ: W8A8_DYNAMIC}, "F32", None, False, False),
        ("modelslim", LLAMA, {Q_PROJ: W8A8}, "BF16", None, False, False),
        ("modelslim", LLAMA, {Q_PROJ: W8A8}, "F32", "bfloat16 and float16 only", True, False),
        ("modelslim", MIXTRAL, {Q_PROJ: W8A8, EXPERT: None}, "BF16", None, False, False),
        ("modelslim", MIXTRAL, {EXPERT: W8A8_DYNAMIC}, "BF16", "doesn't load for mixtral", False, True),
        ("modelslim", {"model_type": "qwen3_moe"}, {EXPERT: W8A8_DYNAMIC}, "BF16", None, False, False),
        ("compressed-tensors", MIXTRAL, {Q_PROJ: W8A8, EXPERT: W8A8_DYNAMIC}, "F32", None, False, False),
        ("compressed-tensors", MIXTRAL, {Q_PROJ: W8A8_ASYMMETRIC, EXPERT: W8A8_DYNAMIC}, "BF16", None, False, False),
        ("compressed-tensors", MIXTRAL, {EXPERT: W8A8_ASYMMETRIC}, "BF16", "quantized symmetrically", False, False),
    ],
)
def test_problems(
    format: str,
    config: dict[str, Any],
    schemes: dict[str, Scheme | None],
    dtype: str | None,
    says: str | None,
    fatal: bool,
    unread: bool,
) -> None:
    found = runtimes.problems(format, config, schemes, dtype)
    assert len(found) == (says is not None)
    for problem in found:
        assert str(says) in problem.text
        assert (problem.fatal, problem.unread) == (fatal, unread)


GPT_OSS = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
MAMBA = {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba"}
UP_PROJ, X_PROJ = "model.layers.0.mlp.up_proj", "backbone.layers.0.mixer.x_proj"


@pytest.mark.parametrize(
    ("runtime", "format", "config", "schemes", "says"),
    [
        ("vllm", "compressed-tensors", MAMBA, {X_PROJ: W8A8_DYNAMIC}, "Mamba layers are quantized"),
        ("vllm", "compressed-tensors", MAMBA, {X_PROJ: None, UP_PROJ: W8A8_DYNAMIC}, None),
        ("vllm", "compressed-tensors", MAMBA | {"model_type": "bamba"}, {X_PROJ: W8A8_DYNAMIC}, None),
        ("vllm", "compressed-tensors", GPT_OSS, {EXPERT: W8A8_DYNAMIC}, "gate and up of gpt-oss in one matrix"),
        ("vllm", "compressed-tensors", GPT_OSS, {EXPERT: None, Q_PROJ: W8A8_DYNAMIC}, None),
        ("vllm", "compressed-tensors", TELECHAT2, {Q_PROJ: W8A8_DYNAMIC}, None),
        ("vllm", "compressed-tensors", TELECHAT2, {Q_PROJ: W8A8, UP_PROJ: W8A8_DYNAMIC}, "only where all are dynamic"),
        ("sglang", "compressed-tensors", LLAMA, {Q_PROJ: W8A8_DYNAMIC, UP_PROJ: W8A8_DYNAMIC}, None),
        ("sglang", "compressed-tensors", LLAMA, {Q_PROJ: W8A8, UP_PROJ: W8A8_DYNAMIC}, "dynamic int8 throughout"),
        ("sglang", "compressed-tensors", LLAMA, {Q_PROJ: W8A8_DYNAMIC, UP_PROJ: None}, "dynamic int8 throughout"),
        ("sglang", "compressed-tensors", QWEN3_MOE, {EXPERT: W8A8_DYNAMIC}, "on Ascend alone"),
        ("sglang", "compressed-tensors", TELECHAT2, {Q_PROJ: W8A8_DYNAMIC}, "no TeleChat2"),
    ],
)
def test_what_one_runtime_does_not_read(
    runtime: str, format: str, config: dict[str, Any], schemes: dict[str, Scheme | None], says: str | None
) -> None:
    (known,) = (each for each in facts.KNOWN if each.name == runtime)
    found = known.limitations(format, Quantized(config, schemes, "BF16"))
    assert len(found) == (says is not None)
    for limitation in found:
        assert limitation.unread
        assert str(says) in limitation.text


def test_quantize_refuses_what_nothing_would_load(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_llama, tmp_path / "float32"))
    file = model / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    for folder, refused in ((tiny_llama, False), (model, True)):
        checkpoint = Checkpoint.open(folder)
        linears = [name.removesuffix(".weight") for name in checkpoint.names if name.endswith("_proj.weight")]

        def make(scheme: str, opened: Checkpoint = checkpoint, names: list[str] = linears) -> object:
            return plan.make(opened, load("default"), scheme, "modelslim", names)

        assert make("w8a8-dynamic")
        if refused:
            with pytest.raises(InputError, match="bfloat16 and float16 only"):
                make("w8a8-static")
        else:
            assert make("w8a8-static")


@pytest.mark.parametrize(
    ("architecture", "scheme", "says"),
    [
        ("Qwen3ForCausalLM", "w8a8", "doesn't load their scales"),
        ("Qwen3ForCausalLM", "w8a8-static", None),
        ("Qwen2ForCausalLM", "w8a8-dynamic", "ignores the quantization"),
        ("Qwen2ForCausalLM", "w8a8-static", None),
        ("Qwen3MoeForCausalLM", "w8a8-static", "ignores the quantization"),
        ("Glm4MoeForCausalLM", "w8a8", "ignores the quantization"),
        ("LlamaForCausalLM", "w8a8", None),
    ],
)
def test_quantize_refuses_what_would_load_as_noise(
    tiny_llama: Path, tmp_path: Path, architecture: str, scheme: str, says: str | None
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    checkpoint = Checkpoint.open(model)
    linears = [name.removesuffix(".weight") for name in checkpoint.names if name.endswith("_proj.weight")]
    if says is None:
        assert plan.make(checkpoint, load("default"), scheme, "golden-stick", linears).policies
        return
    with pytest.raises(InputError, match=says) as caught:
        plan.make(checkpoint, load("default"), scheme, "golden-stick", linears)
    assert "compressed-tensors" in str(caught.value.hint)
    assert ("w8a8-static" in str(caught.value.hint)) == (architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"))


@pytest.fixture(scope="module")
def mindformers() -> Path:
    return unpacked("mindformers==1.7.0") / "mindformers"


def test_mindformers_models_are_what_is_said_of_them(mindformers: Path) -> None:
    """Which inference models there are, which ask for a quantization config, and which know its name for scales."""
    models = {}
    for file in mindformers.glob("models/*/modeling_*_infer.py"):
        (given,) = file.parent.glob(f"{file.stem.removesuffix('_infer')}.py")
        names = re.findall(r"^class (\w+ForCausalLM)\b", given.read_text(), re.MULTILINE)
        models[names[0]] = file.read_text() + (file.parent / "utils.py").read_text()
    assert set(models) == set(vllm_mindspore.MINDFORMERS)
    assert {name for name, text in models.items() if "get_quant_config(" in text} == set(vllm_mindspore.ASKING)
    assert {name for name, text in models.items() if "w_scale" in text} == set(vllm_mindspore.DYNAMIC)
    golden = mindformers / "parallel_core/inference/quantization/golden_stick"
    assert 'insert_param_to_cell("w_scale"' in (golden / "a8dynw8.py").read_text()
    assert "weight_scale" not in (golden / "a8dynw8.py").read_text()


@pytest.fixture(scope="module")
def quantization() -> Path:
    return unpacked(VLLM_ASCEND) / "vllm_ascend" / "quantization"


def test_the_experts_are_those_that_vllm_ascend_finds(quantization: Path) -> None:
    tree = ast.parse((quantization / "modelslim_config.py").read_text())
    (table,) = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "packed_modules_model_mapping" and node.value
    )
    known = ast.literal_eval(table)
    assert {name for name, packed in known.items() if "experts" in packed} == vllm_ascend.EXPERTS


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, qtool.runtimes; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vllm", "numpy", "pydantic", "yaml", "rich"} & set(found)
