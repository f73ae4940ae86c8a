"""Golden Stick through MindFormers: what is generated, the real msrun on this CPU, and cards' parts made whole.

MindFormers itself needs Ascend; here its absence is what the started processes report.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError, QtoolError

HEADS, HIDDEN, DENSE, EXPERT, EXPERTS, CARDS = 16, 64, 96, 32, 2, 4
ATTENTION = {
    "q_a_proj": (32, HIDDEN),
    "q_b_proj": (HEADS * 12, 32),
    "kv_a_proj_with_mqa": (20, HIDDEN),
    "kv_b_proj": (HEADS * 16, 16),
    "o_proj": (HIDDEN, HEADS * 8),
}
# How tensor parallelism splits a layer's weight [out, in], by its last name; the others are on every card.
COLUMNS, ROWS = ("q_b_proj", "kv_b_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_attention_heads": HEADS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}


def mlp(prefix: str, width: int) -> dict[str, tuple[int, int]]:
    shapes = {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def linears() -> dict[str, tuple[int, int]]:
    """DeepSeek-V3 in small: a dense layer, and one with experts."""
    found = mlp("model.layers.0.mlp", DENSE) | mlp("model.layers.1.mlp.shared_experts", EXPERT)
    for expert in range(EXPERTS):
        found |= mlp(f"model.layers.1.mlp.experts.{expert}", EXPERT)
    for layer in (0, 1):
        found |= {f"model.layers.{layer}.self_attn.{name}": shape for name, shape in ATTENTION.items()}
    return found


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("deepseek") / "model"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in linears().items()}
    tensors |= {
        "model.embed_tokens.weight": torch.randn(128, HIDDEN, generator=generator),
        "lm_head.weight": torch.randn(128, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "model.layers.1.mlp.gate.weight": torch.randn(EXPERTS, HIDDEN, generator=generator),
    }
    tensors |= {f"model.layers.{layer}.input_layernorm.weight": torch.ones(HIDDEN) for layer in (0, 1)}
    folder.mkdir()
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_the_yaml_for_deepseek_r1_on_sixteen_cards(
    deepseek: Path, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = ("--recipe", "deepseek-r1-osl", "--engine", "golden-stick", "--output", tmp_path / "out", "--dry-run")
    done = run_qtool("quantize", deepseek, *arguments, "--json")
    assert done.code == 0, done.stderr
    plan = json.loads(done.stdout)
    content = yaml.safe_load(plan["yaml"])
    assert content["pretrained_model_dir"] == str(deepseek)
    assert content["trainer"]["model_name"] == "deepseek_v3"  # mindspore-gs 1.4.1 finds its model class by this
    assert (content["use_parallel"], content["parallel_config"]["model_parallel"]) == (True, 16)
    assert content["context"]["mode"] == 1  # mindspore-gs refuses graph mode
    assert content["model"]["model_config"]["moe_router_fusion"] is True
    program, *options = plan["msrun"].split()
    assert program == "msrun"
    assert {"--worker_num=16", "--local_worker_num=16", "--join=True", "--cluster_time_out=300"} <= set(options)
    assert options[-2].endswith("rank.py")
    assert Path(options[-2]).exists()
    shown = run_qtool("quantize", deepseek, *arguments)
    assert "pretrained_model_dir: " in shown.stdout
    assert plan["msrun"] in shown.stdout
    assert not any(tmp_path.iterdir())


def test_cards_and_seed_come_from_the_command_line(deepseek: Path, run_qtool: Callable[..., Any]) -> None:
    options = (
        "--recipe",
        "deepseek-v3",
        "--engine",
        "golden-stick",
        "--devices",
        8,
        "--seed",
        3,
        "--dry-run",
        "--json",
    )
    content = yaml.safe_load(json.loads(run_qtool("quantize", deepseek, *options).stdout)["yaml"])
    assert (content["parallel_config"]["model_parallel"], content["seed"]) == (8, 3)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3", "qwen3_moe", "telechat"])
def test_every_model_has_a_section(model_type: str, deepseek: Path, tmp_path: Path) -> None:
    from qtool.engines.golden_stick import mindformers

    checkpoint = Checkpoint.open(deepseek)
    checkpoint.config["model_type"] = model_type
    made = mindformers.settings(checkpoint, devices=2, folder=tmp_path, seed=0, seq_len=512)
    # The names under which mindspore-gs 1.4.1 registers its MindFormers models.
    assert made["trainer"]["model_name"] == {"telechat": "telechat2"}.get(model_type, model_type)
    assert made["model"]["model_config"]["compute_dtype"] == "bfloat16"
    assert yaml.safe_load(mindformers.as_yaml(made)) == made
    with pytest.raises(InputError, match="16 attention heads can't be divided among 3 cards"):
        mindformers.settings(checkpoint, devices=3, folder=tmp_path, seed=0, seq_len=512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "compressed-tensors"), "can't be written as compressed-tensors"),
        (("--devices", 3), "can't be divided among 3 cards"),
        (("--seq-len", 65536), "don't fit the cache"),
    ],
)
def test_what_mindformers_cannot_do(
    arguments: tuple[Any, ...], message: str, deepseek: Path, run_qtool: Callable[..., Any]
) -> None:
    done = run_qtool(
        "quantize", deepseek, "--recipe", "deepseek-v3", "--engine", "golden-stick", "--dry-run", *arguments
    )
    assert done.code == 2
    assert message in done.stderr


def test_several_cards_for_a_model_that_only_mindone_has(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("quantize", tiny_llama, "--engine", "golden-stick", "--devices", 2, "--dry-run")
    assert done.code == 2
    assert "'llama' on 2 cards" in done.stderr


def processes_that_mention(text: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def test_a_real_msrun_without_mindformers(
    deepseek: Path, run_qtool: Callable[..., Any], golden_stick: dict[str, str], tmp_path: Path
) -> None:
    """Two processes and a scheduler start; the first one's error comes back, and nothing stays."""
    options = ("--recipe", "deepseek-v3", "--engine", "golden-stick", "--devices", 2, "--samples", 1, "--seq-len", 16)
    done = run_qtool("quantize", deepseek, *options, "--output", tmp_path / "out", env=golden_stick)
    assert done.code == 2
    assert "mindformers is not installed" in done.stderr
    assert "mindformers 1.7.0" in done.stderr
    assert done.stdout == ""
    assert not any(tmp_path.iterdir())
    assert processes_that_mention(str(tmp_path)) == []


# ------------------------------------------------------------ cards' parts


def quantized() -> dict[str, torch.Tensor]:
    """Whole tensors as mindspore-gs would save them from one card: attention static, the rest dynamic."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out_size, in_size) in linears().items():
        if name.endswith("kv_b_proj"):
            tensors[f"{name}.weight"] = torch.randn(out_size, in_size, generator=generator).to(torch.bfloat16)
            continue
        weight = torch.randint(-128, 128, (out_size, in_size), generator=generator).to(torch.int8)
        parts = {
            "weight": weight,
            "weight_scale": torch.rand(out_size, generator=generator),
            "weight_offset": torch.zeros(out_size, dtype=torch.int32),
        }
        if "self_attn" in name:
            offset = torch.full((in_size,), 7, dtype=torch.int8)
            parts |= {
                "smooth_scale": torch.rand(in_size, generator=generator),
                "input_scale": torch.rand(in_size, generator=generator),
                "input_offset": offset,
                "deq_scale": torch.rand(out_size, generator=generator),
                "quant_bias": -(weight.int() * 7).sum(1, dtype=torch.int32),
            }
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def part_of(name: str, tensor: torch.Tensor, card: int) -> torch.Tensor:
    layer, _, part = name.rpartition(".")
    last = layer.rpartition(".")[2]
    along_input = part in ("input_scale", "input_offset", "smooth_scale")
    if last in COLUMNS and not along_input:
        return tensor.chunk(CARDS, dim=0)[card].contiguous()
    if last in ROWS and part == "quant_bias":
        return tensor // CARDS  # a share of the sum, whatever it is
    if last in ROWS and (part == "weight" or along_input):
        return tensor.chunk(CARDS, dim=-1)[card].contiguous()
    return tensor


@pytest.fixture
def left_behind(tmp_path: Path) -> Path:
    folder, whole = tmp_path / "quantized", quantized()
    for card in range(CARDS):
        (folder / f"rank_{card}").mkdir(parents=True)
        save_file(
            {name: part_of(name, tensor, card) for name, tensor in whole.items()},
            folder / f"rank_{card}" / "quant.safetensors",
        )
    types = {name: "W8A8" if "self_attn" in name else "W8A8_DYNAMIC" for name in whole}
    types |= {name: "FLOAT" for name in whole if "kv_b_proj" in name}
    (folder / "quantization_description.json").write_text(json.dumps(types))
    return folder


def test_cards_parts_make_up_the_whole(deepseek: Path, left_behind: Path) -> None:
    from qtool.engines.golden_stick.shards import Parts

    made = dict(Parts(left_behind).tensors(Checkpoint.open(deepseek)))
    for name, tensor in quantized().items():
        assert torch.equal(made.pop(name), tensor), name
    source = Checkpoint.open(deepseek)
    assert set(made) == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert all(torch.equal(tensor, source.tensor(name)) for name, tensor in made.items())


def test_they_become_a_golden_stick_checkpoint(
    deepseek: Path, left_behind: Path, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    from qtool.engines.golden_stick import export

    class Quiet:
        def progress(self, *_: Any) -> None:
            pass

    job = {
        "source": str(deepseek),
        "quantized": str(left_behind),
        "output": str(tmp_path / "out"),
        "format": "golden-stick",
        "overwrite": False,
        "max_shard_gb": 4.0,
        "schemes": None,
        "report": {"engine": "golden-stick"},
    }
    export.main(job, Quiet())  # type: ignore[arg-type]
    types = json.loads((tmp_path / "out" / "quantization_description.json").read_text())
    assert types["model.layers.0.self_attn.o_proj.smooth_scale"] == "W8A8"
    assert types["model.layers.1.mlp.experts.1.down_proj.weight"] == "W8A8_DYNAMIC"
    assert types["lm_head.weight"] == types["model.layers.0.self_attn.kv_b_proj.weight"] == "FLOAT"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    inspected = json.loads(run_qtool("inspect", tmp_path / "out", "--json").stdout)
    assert inspected["format"] == "golden-stick"
    schemes = {group["layers"]: group["scheme"] for group in inspected["layers"]}
    assert schemes["model.layers.*.self_attn.o_proj"] == "W8A8 static"
    assert schemes["model.layers.*.mlp.experts.*.up_proj"] == "W8A8 dynamic"


def test_a_card_that_is_missing_is_an_error(deepseek: Path, left_behind: Path) -> None:
    from qtool.engines.golden_stick.shards import Parts

    (left_behind / "rank_3" / "quant.safetensors").unlink()
    with pytest.raises(QtoolError, match="no quantized weights"):
        Parts(left_behind)
    (left_behind / "rank_3").rmdir()
    with pytest.raises(QtoolError, match=r"3 cards have .* don't add up to"):
        dict(Parts(left_behind).tensors(Checkpoint.open(deepseek)))
