"""Loading, resolving and matching recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool.errors import InputError
from qtool.recipe import load

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
OTHER_SHAPES = {
    "deepseek-v3",
    "deepseek-r1-osl",
    "deepseek-r1-a8w4",
    "golden-stick-osl",
}  # the others have the default's
MINIMAL = """\
name: mine
description: mine
default_scheme: s
schemes:
  s:
    - layers: '.*'
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_names_are_the_files_shipped() -> None:
    assert load.names() == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert {"default", "smollm2", "llama3", "qwen2.5", "qwen3", "mistral"} <= set(load.names())


@pytest.mark.parametrize("name", [path.stem for path in RECIPES.glob("*.yaml")])
def test_every_shipped_recipe_is_valid_and_named_after_its_file(name: str) -> None:
    recipe = load.load(name)
    assert recipe.name == name
    assert set(recipe.schemes) >= ({"w8a8"} if name == "golden-stick-osl" else {"w8a8", "w8a8-dynamic"})
    other = {"telechat2": "w8a8-dynamic", "deepseek-r1-a8w4": "a8w4"}
    assert recipe.default_scheme == other.get(name, "w8a8")
    assert recipe.source
    assert recipe.generate.temperature == 0


# The names of the linear layers of these models as transformers has them, and of fused ones as other runtimes do.
@pytest.mark.parametrize(
    ("linear", "static"),
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.31.self_attn.o_proj", True),
        ("model.layers.0.self_attn.qkv_proj", True),
        ("transformer.h.3.attn.c_attn", True),
        ("gpt_neox.layers.0.attention.query_key_value", True),
        ("transformer.h.0.self_attention.dense", True),
        ("model.layers.0.mlp.gate_proj", False),
        ("model.layers.0.mlp.gate_up_proj", False),
        ("model.layers.11.mlp.down_proj", False),
        ("model.layers.0.feed_forward.w1", False),
        ("transformer.layers.0.ffn.up", False),
    ],
)
@pytest.mark.parametrize("name", sorted(set(load.names()) - OTHER_SHAPES))
def test_shipped_schemes_cover_the_linears_of_decoder_layers(name: str, linear: str, static: bool) -> None:
    recipe = load.load(name)
    policy = recipe.policy("w8a8", linear)
    assert policy is not None
    assert policy.activations.mode == ("static" if static else "dynamic")
    assert policy.smoothing.method == "osl"
    dynamic = recipe.policy("w8a8-dynamic", linear)
    assert dynamic is not None
    assert (dynamic.activations.mode, dynamic.smoothing.method) == ("dynamic", "osl")


@pytest.mark.parametrize(
    "linear", ["lm_head", "model.lm_head", "embed_out", "visual.blocks.0.attn.qkv", "vision_tower.layers.0.mlp.fc1"]
)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_shipped_schemes_leave_heads_and_vision_float(linear: str, scheme: str) -> None:
    assert load.load("default").policy(scheme, linear) is None


@pytest.mark.parametrize(
    ("linear", "label"),
    [
        ("model.layers.5.mlp.experts.17.gate_proj", "W4A8 dynamic in groups of 128"),
        ("model.layers.5.feed_forward.routed_experts.ffn.w1", "W4A8 dynamic in groups of 128"),
        ("model.layers.5.mlp.shared_experts.down_proj", "W8A8 dynamic"),
        ("model.layers.0.mlp.gate_proj", "W8A8 dynamic"),
        ("model.layers.5.self_attn.q_a_proj", "W8A8 dynamic"),
        ("model.layers.5.self_attn.kv_b_proj", None),
        ("model.layers.5.mlp.gate", None),
        ("lm_head", None),
    ],
)
def test_int4_is_for_routed_experts(linear: str, label: str | None) -> None:
    """MindFormers has it for nothing else; Golden Stick's A8W4 rounds by GPTQ."""
    policy = load.load("deepseek-r1-a8w4").policy("a8w4", linear)
    assert (policy.scheme.label if policy else None) == label
    assert policy is None or (policy.rounding.method == "gptq") == policy.scheme.label.startswith("W4")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1-osl"])
@pytest.mark.parametrize(
    ("linear", "mode"),
    [
        # Hugging Face, MindFormers 1.7 (mcore), MindFormers' older research/deepseek3
        ("model.layers.5.self_attn.q_a_proj", "static"),
        ("model.layers.5.self_attn.o_proj", "static"),
        ("model.decoder.layers.5.self_attention.linear_kv_down_proj", "static"),
        ("model.layers.5.attention.q2l_proj", "static"),
        ("model.layers.5.self_attn.kv_b_proj", None),
        ("model.decoder.layers.5.self_attention.linear_kv_up_proj", None),
        ("model.layers.5.attention.lkv2kv", None),
        ("model.layers.5.mlp.gate", None),
        ("model.decoder.layers.5.mlp.router", None),
        ("model.layers.5.feed_forward.routed_experts.router.dense", None),
        ("model.layers.5.mlp.experts.17.gate_proj", "dynamic"),
        ("model.layers.5.mlp.shared_experts.down_proj", "dynamic"),
        ("model.layers.0.mlp.gate_proj", "dynamic"),
        ("model.decoder.layers.5.mlp.experts.linear_fc1", "dynamic"),
        ("model.layers.5.feed_forward.routed_experts.ffn.w1", "dynamic"),
        ("model.layers.61.eh_proj", None),
        ("lm_head", None),
    ],
)
def test_deepseek_in_the_names_of_both_frameworks(name: str, linear: str, mode: str | None) -> None:
    policy = load.load(name).policy("w8a8", linear)
    assert (policy.activations.mode if policy else None) == mode
    if policy:
        assert (policy.smoothing.method, policy.clip) == (("osl", True) if mode == "static" else ("none", False))


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "glm4-moe"])
@pytest.mark.parametrize(
    ("linear", "modes"),
    [
        # in w8a8, w8a8-dynamic and w8a8-static
        ("model.layers.5.self_attn.q_proj", ("static", "dynamic", "static")),
        ("model.layers.5.self_attn.o_proj", ("static", "dynamic", "static")),
        ("model.layers.5.mlp.gate", (None, None, None)),
        ("model.layers.5.block_sparse_moe.gate", (None, None, None)),
        ("model.layers.5.mlp.experts.17.gate_proj", ("dynamic", "dynamic", None)),
        ("model.layers.5.mlp.experts.17.down_proj", ("dynamic", "dynamic", None)),
        ("model.layers.5.block_sparse_moe.experts.7.w1", ("dynamic", "dynamic", None)),
        ("model.layers.5.block_sparse_moe.experts.7.w2", ("dynamic", "dynamic", None)),
        ("model.layers.5.mlp.shared_experts.up_proj", ("dynamic", "dynamic", "static")),
        ("model.layers.5.mlp.shared_experts.down_proj", ("dynamic", "dynamic", None)),
        ("model.layers.0.mlp.gate_proj", ("dynamic", "dynamic", "static")),
        ("model.layers.0.mlp.down_proj", ("dynamic", "dynamic", None)),
        ("model.layers.46.eh_proj", (None, None, None)),
        ("model.layers.46.shared_head.head", (None, None, None)),
        ("lm_head", (None, None, None)),
    ],
)
def test_experts_are_dynamic_or_float_and_routers_float(
    name: str, linear: str, modes: tuple[str | None, str | None, str | None]
) -> None:
    recipe = load.load(name)
    policies = [recipe.policy(scheme, linear) for scheme in ("w8a8", "w8a8-dynamic", "w8a8-static")]
    assert tuple(policy.activations.mode if policy else None for policy in policies) == modes


def test_deepseek_r1_runs_on_sixteen_cards() -> None:
    recipe = load.load("deepseek-r1-osl")
    assert (recipe.launch.devices, recipe.generate.tensor_parallel_size) == (16, 16)
    assert recipe.export.format == "golden-stick"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "deepseek_v3"}, "deepseek-v3"),
        ({"model_type": "deepseek_v3", "_name_or_path": "deepseek-ai/DeepSeek-R1"}, "deepseek-r1-osl"),
        ({"model_type": "telechat"}, "telechat2"),
        ({"model_type": "glm4v"}, "glm4v"),
        ({"model_type": "llama", "vocab_size": 49152, "hidden_size": 576}, "smollm2"),
        ({"model_type": "llama", "vocab_size": 49152, "hidden_size": 2048}, "smollm2"),
        ({"model_type": "llama", "vocab_size": 49152, "hidden_size": 4096}, "default"),
        ({"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096}, "llama3"),
        ({"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096}, "default"),
        ({"model_type": "qwen2", "vocab_size": 151936}, "qwen2.5"),
        ({"model_type": "qwen3", "vocab_size": 151936}, "qwen3"),
        ({"model_type": "mistral", "sliding_window": 4096}, "mistral"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "qwen3-moe"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": "glm4_moe"}, "glm4-moe"),
        ({"model_type": "gemma2"}, "default"),
        ({}, "default"),
    ],
)
def test_match_takes_the_most_specific(config: dict[str, Any], name: str) -> None:
    recipe, reason = load.match(config)
    assert recipe.name == name
    assert str(config.get("model_type")) in reason
    if name == "smollm2":
        assert reason == f"model_type is llama, vocab_size is 49152, hidden_size is {config['hidden_size']}"


def test_a_file_loads_and_extends_overrides_key_by_key(write: Any) -> None:
    path = write(
        "extends: default\nname: mine\ndescription: mine\ncalibration: {samples: 7}\n"
        "schemes:\n  w8a8:\n    - layers: '.*q_proj'\n      rounding: nearest\n"
    )
    recipe, default = load.load(path), load.load("default")
    assert recipe.calibration.samples == 7
    assert recipe.calibration.seq_len == default.calibration.seq_len
    assert [policy.layers for policy in recipe.schemes["w8a8"]] == [".*q_proj"]
    assert recipe.schemes["w8a8-dynamic"] == default.schemes["w8a8-dynamic"]
    assert recipe.match == default.match
    assert recipe.source == default.source


def test_extends_takes_a_path_relative_to_the_file(write: Any) -> None:
    write(MINIMAL, "base.yaml")
    path = write("extends: ./base.yaml\nname: child\ndescription: c\nmatch: {model_type: [x]}\n", "child.yaml")
    recipe = load.load(path)
    assert (recipe.name, recipe.match.model_type, list(recipe.schemes)) == ("child", ["x"], ["s"])


def test_the_name_and_match_of_a_base_are_not_inherited(write: Any) -> None:
    with pytest.raises(InputError) as caught:
        load.load(write("extends: smollm2\n"))
    assert "name: is missing" in str(caught.value)
    assert "description: is missing" in str(caught.value)
    assert load.load(write("extends: smollm2\nname: a\ndescription: a\n")).match.model_type == []


def test_recipes_that_extend_each_other_are_an_error(write: Any) -> None:
    write("extends: ./b.yaml\nname: a\n", "a.yaml")
    with pytest.raises(InputError, match="circle"):
        load.load(write("extends: ./a.yaml\nname: b\n", "b.yaml"))


@pytest.mark.parametrize("name", load.names())
def test_resolved_is_the_same_recipe_without_extends(name: str, write: Any) -> None:
    text = load.resolved(name)
    assert "extends" not in yaml.safe_load(text)
    assert load.load(write(text)) == load.load(name)


# what to replace in MINIMAL, by what; the line and the key that must be named; words of the message
@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("name: mine", "name: mine\nexprot: {}", 2, r"^exprot: unknown key; did you mean 'export'\?$"),
        ("default_scheme: s", "default_scheme: t", 3, "^default_scheme: .t. is not one of the schemes s$"),
        ("'.*'", "'.*('", 6, r"schemes\.s\[0\]\.layers: not a regular expression: missing \)"),
        ("'.*'", "[1]", 6, r"schemes\.s\[0\]\.layers: must be text, not \[1\]"),
        ("'.*'", "'.*'\n      smoting: osl", 7, r"schemes\.s\[0\]\.smoting: unknown key; did you mean 'smoothing'"),
        ("'.*'", "'.*'\n      zebra: 1", 7, r"schemes\.s\[0\]\.zebra: unknown key; known are layers, quantize"),
        ("'.*'", "'.*'\n      smoothing: awq", 7, "must be 'osl', 'smoothquant' or 'none', not 'awq'"),
        ("'.*'", "'.*'\n      activations:\n        mod: static", 8, r"activations\.mod: unknown key.*'mode'"),
        (
            "'.*'",
            "'.*'\n      smoothing: {method: awq}",
            7,
            r"smoothing\.method: must be 'osl', 'smoothquant' or 'none'",
        ),
        ("'.*'", "'.*'\n      smoothing: {alpha: 0.5}", 7, r"schemes\.s\[0\]\.smoothing\.method: is missing"),
        ("'.*'", "'.*'\n      smoothing: 3", 7, r"schemes\.s\[0\]\.smoothing: must be a mapping .*, not 3"),
        (
            "'.*'",
            "'.*'\n      smoothing:\n        method: smoothquant\n        alpha: 2",
            9,
            r"\[0\]\.smoothing\.alpha: must be 1 or less, not 2",
        ),
        (
            "'.*'",
            "'.*'\n      smoothing: smoothquant\n      smoothquant_alpha: 2",
            8,
            r"^schemes\.s\[0\]\.smoothquant_alpha: must be 1 or less",
        ),
        (
            "'.*'",
            "'.*'\n      smoothing:\n        method: osl\n        alpha: 0.5",
            9,
            r"smoothing\.alpha: unknown key; known are method$",
        ),
        (
            "'.*'",
            "'.*'\n      activations:\n        mode: static\n        observer: percentile\n        percentile: 10",
            10,
            r"^schemes\.s\[0\]\.activations\.percentile: must be greater than 50",
        ),
        (
            "'.*'",
            "'.*'\n      activations:\n        mode: static\n        observer: mean",
            9,
            r"activations\.observer: must be 'minmax', 'percentile' or 'mse', not 'mean'",
        ),
        (
            "'.*'",
            "'.*'\n      rounding: gtpq",
            7,
            r"schemes\.s\[0\]\.rounding: must be 'nearest' or 'gptq', not 'gtpq'",
        ),
        (
            "'.*'",
            "'.*'\n      scheme: W8A7",
            7,
            r"schemes\.s\[0\]\.scheme: must be one of W8A8, W8A8-dynamic, .*, not 'W8A7'",
        ),
        (
            "'.*'",
            "'.*'\n      scheme: W8A8\n      activations: static",
            8,
            r"\.activations: is already given by scheme",
        ),
        ("'.*'", "'.*'\n      weights: {type: bool}", 7, r"\[0\]\.weights\.type: must be 'int' or 'float', not 'bool'"),
        ("'.*'", "'.*'\n      weights: {num_bits: 9}", 7, r"weights\.num_bits: must be 8 or less"),
        (
            "'.*'",
            "'.*'\n      weights:\n        type: float\n        symmetric: false",
            9,
            "can be false only for integers",
        ),
        ("'.*'", "'.*'\n      weights: {strategy: group}", 7, r"weights\.group_size: is missing"),
        (
            "'.*'",
            "'.*'\n      weights: {strategy: token}",
            7,
            "weights.strategy: must be 'tensor', 'channel', 'group' or 'block'",
        ),
        ("'.*'", "'.*'\n      weights: int4", 7, r"\[0\]\.weights: must be a mapping of keys to values, not 'int4'"),
        ("name: mine", "name: mine\ncalibration: {samples: 0}", 2, r"calibration\.samples: must be greater than 0"),
        (
            "name: mine",
            "name: mine\nexport: {max_shard_gb: 5}",
            2,
            r"export\.max_shard_gb: must be 4 or less, not 5",
        ),
        ("default_scheme: s\n", "", 3, r"^schemes: has no 'w8a8', which is the default_scheme unless"),
        ("name: mine", "name: mine\nmodel: {hub: modelers, repo: x}", 2, r"^model\.repo: must look like ORG/NAME, not"),
        ("name: mine", "name: mine\nexport: {also: [modelslim, modelslim]}", 2, r"^export\.also: each format once"),
        (
            "name: mine",
            "name: mine\ngenerate:\n  min_tokens: 70",
            3,
            r"^generate\.min_tokens: is 70, which is more than",
        ),
        ("name: mine", "name: mine\nname: yours", 2, "name: duplicate key, first on line 1"),
        ("name: mine", "name: Not Good", 1, "name: must be of lower-case letters"),
        ("name: mine", "name: [", 3, "not valid YAML"),
        ("name: mine", "name: *x", 1, "not valid YAML|aliases"),
        ("name: mine", "name: &x mine", 1, "anchors and aliases are not supported"),
        ("name: mine", "name: !!python/object/apply:os.system [true]", 1, "name: tag .*os.system' is not supported"),
        ("name: mine", "name: mine\n1: 2", 2, "a key must be text, not '1'"),
        ("name: mine", "name: mine\n---", 2, "not valid YAML"),
        ("name: mine", "name: mine\nextends: 3", 2, "extends: must be the name or the path"),
    ],
)
def test_errors_name_file_line_and_key(write: Any, old: str, new: str, line: int, message: str) -> None:
    assert old in MINIMAL
    path = write(MINIMAL.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load.load(path)
    error = caught.value
    assert error.exit_code == 2
    assert error.where == f"{path}:{line}"
    assert re.search(message, error.what), error.what


def test_several_problems_are_reported_at_once(write: Any) -> None:
    path = write("extends: default\nname: X\ncalibration:\n  samples: no\n  seq_len: -1\nfoo: 1\n")
    with pytest.raises(load.RecipeError) as caught:
        load.load(path)
    problems = caught.value.problems
    assert [(p.line, p.key) for p in problems] == [
        (1, "description"),
        (2, "name"),
        (4, "calibration.samples"),
        (5, "calibration.seq_len"),
        (6, "foo"),
    ]
    assert {p.file for p in problems} == {path}
    assert caught.value.what.startswith("5 problems: line 1: description: is missing; line 2: ")
    assert caught.value.hint is not None
    assert "qtool recipes validate" in caught.value.hint


def test_no_kind_of_problem_hides_another(write: Any) -> None:
    """Of the text, of single keys, of keys together; in the file and in the one that it extends."""
    base = write(
        "name: base\ndescription: b\ndescription: c\nexport: {format: modelslim, also: [modelslim], zebra: 1}\n"
        "schemes:\n  s:\n    - {layers: '(', scheme: W8, "
        "weights: {strategy: tensor, group_size: 8, symmetric: false, num_bits: 99}}\n",
        "base.yaml",
    )
    path = write("extends: ./base.yaml\nname: child\nname: again\ndefault_scheme: t\nfoo: 1\n", "child.yaml")
    with pytest.raises(load.RecipeError) as caught:
        load.load(path)
    found = {(Path(p.file).name, p.line, p.key) for p in caught.value.problems}
    assert found == {
        ("child.yaml", 1, "description"),
        ("child.yaml", 3, "name"),
        ("child.yaml", 4, "default_scheme"),
        ("child.yaml", 5, "foo"),
        ("base.yaml", 3, "description"),
        ("base.yaml", 4, "export.also"),
        ("base.yaml", 4, "export.zebra"),
        ("base.yaml", 7, "schemes.s[0].layers"),
        ("base.yaml", 7, "schemes.s[0].scheme"),
        ("base.yaml", 7, "schemes.s[0].weights"),
        ("base.yaml", 7, "schemes.s[0].weights.group_size"),
        ("base.yaml", 7, "schemes.s[0].weights.num_bits"),
        ("base.yaml", 7, "schemes.s[0].weights.symmetric"),
    }
    assert Path(base).is_file()


def test_a_problem_in_the_base_is_reported_there(write: Any) -> None:
    base = write(MINIMAL.replace("'.*'", "'.*('"), "base.yaml")
    with pytest.raises(InputError) as caught:
        load.load(write("extends: ./base.yaml\nname: c\ndescription: c\n"))
    assert caught.value.where is not None
    assert Path(caught.value.where.rpartition(":")[0]).samefile(base)
    assert caught.value.where.endswith(":6")


def test_a_wrong_name_suggests_the_right_one() -> None:
    with pytest.raises(InputError) as caught:
        load.load("smolm2")
    assert "did you mean 'smollm2'?" in (caught.value.hint or "")


def test_extending_a_wrong_name_says_where(write: Any) -> None:
    path = write("name: x\nextends: defualt\n")
    with pytest.raises(InputError) as caught:
        load.load(path)
    assert caught.value.where == f"{path}:2: extends"
    assert "did you mean 'default'?" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"# nothing\n", "empty"),
        (b"- a\n", "must be a mapping"),
        (b"just text", "must be a mapping"),
        (b"\xff\xfe\x00\x01", "not UTF-8"),
        (b"name: a\x00b", "unprintable|not valid YAML"),
        (b"a: " + b"[" * 100 + b"]" * 100, "nested more than"),
        (b"a: " + b"x" * 300_000, "at most"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load.load(path)


def test_missing_unreadable_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe file"):
        load.load(tmp_path / "no.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="can't read"):
        load.load(tmp_path / "folder.yaml")


def test_a_recipe_may_name_a_model_and_does_not_pass_it_on(write: Any) -> None:
    write(MINIMAL + "model: {hub: modelers, repo: org/name}\n", "base.yaml")
    child = write("extends: base.yaml\nname: child\ndescription: c\n", "child.yaml")
    assert load.load(child).model is None
    model = load.load("deepseek-r1-w8a8").model
    assert model is not None
    assert (model.hub, model.repo, model.revision) == ("modelers", "MindSpore-Lab/DeepSeek-R1-W8A8", None)
    with pytest.raises(InputError, match=r"model\.repo"):
        load.load(write(MINIMAL + "model: {hub: modelers, repo: name}\n"))


def test_a_long_chain_of_extends(tmp_path: Path) -> None:
    for i in range(2000):
        (tmp_path / f"r{i}.yaml").write_text(f"extends: ./r{i + 1}.yaml\nname: r{i}\n")
    with pytest.raises(InputError, match="more than 16 times"):
        load.load(str(tmp_path / "r0.yaml"))
