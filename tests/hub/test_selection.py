"""What is downloaded when nobody says, and when somebody does."""

from __future__ import annotations

import pytest

from qtool.errors import InputError
from qtool.hub.listing import RemoteFile
from qtool.hub.selection import select

NEEDED = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/tool.jinja", "modeling_x.py",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "quantization_description.json", "README.md",
    "LICENSE", "qwen.tiktoken",
]  # fmt: skip
NEEDLESS = [
    ".gitattributes", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pth", "tf_model.h5", "m.ot",
    "flax_model.msgpack", "onnx/model.onnx", "onnx/decoder/model.onnx_data", "openvino/openvino_model.xml",
    "model-Q4_K_M.gguf", "original/consolidated.00.pth", "original/params.json", "consolidated.safetensors",
    "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json",
    "runs/events.out.tfevents.1", "global_step100/zero_pp_rank_0.pt", "figures/benchmark.png", "qtool.lock.json",
]  # fmt: skip


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1, "0" * 40) for path in paths]


def names(taken: list[RemoteFile]) -> list[str]:
    return [file.path for file in taken]


def test_by_default_what_a_quantizer_or_a_runtime_reads() -> None:
    taken, left = select(files(*NEEDED, *NEEDLESS), [], [], "org/m")
    assert (names(taken), names(left)) == (NEEDED, NEEDLESS)


def test_other_formats_count_where_there_are_no_safetensors() -> None:
    assert names(select(files("m.Q4.gguf", "README.md"), [], [], "r")[0]) == ["m.Q4.gguf", "README.md"]
    mistral = ["consolidated.safetensors", "params.json"]
    taken, _ = select(files(*mistral), [], [], "r")
    assert names(taken) == mistral


def test_include_takes_exactly_what_it_names() -> None:
    available = files("a.json", "b/c.json", "onnx/m.onnx", "x.txt")
    assert names(select(available, ["*.json"], [], "r")[0]) == ["a.json", "b/c.json"]
    assert names(select(available, ["onnx/"], [], "r")[0]) == ["onnx/m.onnx"]
    assert names(select(available, ["*"], ["*.json", "onnx/"], "r")[0]) == ["x.txt"]


@pytest.mark.parametrize(
    ("available", "include", "exclude", "words"),
    [
        (["a.json"], ["*.txt"], [], "no file matches"),
        (["a.json"], [], ["*"], "nothing to download"),
        ([], [], [], "empty"),
        (["a.json", "m.ckpt"], [], [], "can be a pickle"),
    ],
)
def test_nothing_to_download(available: list[str], include: list[str], exclude: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        select(files(*available), include, exclude, "org/m")


def test_consolidated_weights_beside_others_are_left() -> None:
    taken, _ = select(files("consolidated.safetensors", "model.safetensors"), [], [], "r")
    assert names(taken) == ["model.safetensors"]
