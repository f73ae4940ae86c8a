"""config.json is believed only as far as the tensors go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.checkpoint.config import check_kinds, context
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError

HUGE = 10**9
CLAIMS = [
    ({"num_hidden_layers": HUGE}, "num_hidden_layers is 1,000,000,000, but the tensors are of 2 at most"),
    ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
    ({"head_dim": HUGE}, "head_dim is 1,000,000,000, but no tensor has a side longer than"),
    ({"hidden_size": HUGE}, "hidden_size"),
    ({"intermediate_size": 1e12}, "intermediate_size"),
    ({"vocab_size": HUGE}, "vocab_size"),
    ({"num_attention_heads": HUGE}, "num_attention_heads"),
    ({"max_position_embeddings": HUGE}, "max_position_embeddings"),
    ({"num_local_experts": HUGE}, "num_local_experts"),
    ({"vision_config": {"depth": HUGE}}, "depth is"),
    ({"text_config": {"num_hidden_layers": HUGE}}, "num_hidden_layers"),
]
KINDS = [
    {"num_hidden_layers": "two"}, {"num_hidden_layers": True}, {"text_config": [1]}, {"quantization_config": "int8"},
    {"architectures": "Llama"}, {"architectures": [1]}, {"model_type": {}}, {"eos_token_id": "x"},
    {"eos_token_id": [1, "x"]}, {"text_config": {"vocab_size": 1.5}}, {"rope_scaling": [2]},
]  # fmt: skip


@pytest.fixture
def changed(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny model with another config.json."""

    def change(changes: dict[str, Any], file: str = "config.json") -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
        known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(known | changes))
        return folder

    return change


@pytest.mark.parametrize(("changes", "message"), CLAIMS, ids=[str(changes) for changes, _ in CLAIMS])
def test_a_size_that_the_tensors_cannot_be_of(changed: Any, changes: dict[str, Any], message: str) -> None:
    checkpoint = Checkpoint.open(changed(changes))
    with pytest.raises(InputError, match=message) as raised:
        checkpoint.check_claims()
    assert raised.value.where == str(checkpoint.path / "config.json")


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_value_of_another_kind(changed: Any, config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be"):
        check_kinds(config, "config.json")
    with pytest.raises(InputError, match="must be"):
        Checkpoint.open(changed(config))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2", "gemma2", "gpt_neox"])
def test_what_is_right_is_believed(make_model: Callable[..., Path], model_type: str) -> None:
    Checkpoint.open(make_model(model_type)).check_claims()


@pytest.mark.parametrize(
    ("scaling", "tokens"),
    [
        (None, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "llama3", "factor": 8.0}, 512),
        ({"rope_type": "linear", "factor": "x"}, 512),
    ],
)
def test_the_context(scaling: Any, tokens: int) -> None:
    assert context({"max_position_embeddings": 512, "rope_scaling": scaling}) == tokens
    assert context({"text_config": {"max_position_embeddings": 512, "rope_parameters": scaling}}) == tokens


COMMANDS = {
    "quantize": lambda model, tmp: ["quantize", model, "-o", tmp / "out", "--dry-run", "--memory", "1GB"],
    "generate": lambda model, tmp: ["generate", model, "--prompt", "x", "--runtime", "transformers"],
    "analyze": lambda model, tmp: ["analyze", model],
    "eval": lambda model, tmp: ["eval", model, model],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it_before_they_build_anything(
    changed: Any, tmp_path: Path, run_qtool: Callable[..., Any], command: str
) -> None:
    model = changed({"num_hidden_layers": HUGE})
    done = run_qtool(*COMMANDS[command](model, tmp_path))
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert "num_hidden_layers is 1,000,000,000" in done.stderr
    assert "log" not in done.stderr


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": "nothing_known"}),
        ("config.json", {"hidden_act": "none such"}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"rope_parameters": {"rope_type": "linear"}}),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("generation_config.json", {"eos_token_id": [None]}),
    ],
    ids=str,
)
def test_what_a_runtime_cannot_load_is_bad_input(
    changed: Any, run_qtool: Callable[..., Any], file: str, changes: dict[str, Any]
) -> None:
    model = changed(changes, file)
    done = run_qtool("generate", model, "--prompt", "x", "--runtime", "transformers", "--max-tokens", "1")
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert "bug in qtool" not in done.stderr
    assert "Error:" not in done.stderr.partition("\n")[0].removeprefix("error:")[:30]
