"""Calibration on messages with pictures: layers see what they see in transformers, when it runs the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qtool.calibration import pictures, text
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.model.decoder import DecoderStream
from qtool.model.state import Batch

LENGTH = 40
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)


@dataclass(frozen=True)
class Kind:
    """A type, what its tokenizer calls the marks of pictures, and how a prompt holds one."""

    model_type: str
    marks: dict[str, str]  # setting of config.json -> token
    attributes: dict[str, str]
    image: str


KINDS = {
    "qwen2_vl": Kind(
        "qwen2_vl",
        {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        {},
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "gemma3": Kind(
        "gemma3",
        {
            "image_token_id": "<image_soft_token>",
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "<start_of_image>",
    ),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random one with its tokenizer and processor."""
    from tests.families import train_tokenizer
    from tests.zoo import configs, models

    folder = models.make("image", kind.model_type, tmp_path_factory.mktemp("pictured") / kind.model_type)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = train_tokenizer(configs.MARKS.start)
    named = {config[setting]: token for setting, token in kind.marks.items() if setting in config}
    tokenizer.add_tokens([named.get(number, f"<mark {number}>") for number in configs.MARKS], special_tokens=True)
    for attribute, token in kind.attributes.items():
        tokenizer._set_model_specific_special_tokens({attribute: token})
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", kind.image)
    if kind.model_type == "qwen2_vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        vision = config["vision_config"]
        Qwen2VLImageProcessorPil(
            patch_size=vision["patch_size"],
            merge_size=vision["spatial_merge_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            min_pixels=256,
            max_pixels=1024,
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
        from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

        images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        processor = Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    generator, lines = np.random.default_rng(0), []
    for number in range(8):
        pixels = generator.integers(0, 256, (24 + 4 * number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        content = [
            {"type": "text", "text": "What is this? "},
            {"type": "image", "path": f"{number}.png"},
            {"type": "text", "text": "Answer in one short sentence about the picture, and nothing else."},
        ]
        lines.append({"messages": [{"role": "user", "content": content}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def test_layers_see_what_they_see_in_transformers(model: Path, rows: Path) -> None:
    from transformers import AutoModelForImageTextToText

    assert pictures.has_pictures(str(rows))
    found = pictures.load(str(rows), model, samples=2, seq_len=LENGTH, trust_remote_code=False)
    assert found.ids.shape == (2, LENGTH)
    whole = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    stream = DecoderStream(Checkpoint.open(model), dtype=torch.float32)
    stream.show(found.inputs, LENGTH)
    for number, inputs in enumerate(found.inputs):
        assert torch.equal(inputs["input_ids"][0, :LENGTH], found.ids[number])
        assert (inputs["pixel_values"] != 0).any()
        with torch.no_grad(), _inputs_of(whole) as seen:
            whole(**inputs, use_cache=False)
        batch = Batch(found.ids[number : number + 1], (), range(number, number + 1))
        for index in range(stream.depth):
            with torch.no_grad(), stream.layer(index) as layer:
                batch = stream.run(index, layer, batch)
            wanted = seen[index + 1][:, :LENGTH]
            assert torch.allclose(batch.state[0], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


class _inputs_of:
    """What enters each decoder layer, and the final norm."""

    def __init__(self, whole: Any) -> None:
        decoder = whole.model.language_model
        self._modules = [*decoder.layers, decoder.norm]

    def __enter__(self) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        self._hooks = [
            module.register_forward_pre_hook(
                lambda _m, args, kwargs: seen.append((args or [kwargs["hidden_states"]])[0]), with_kwargs=True
            )
            for module in self._modules
        ]
        return seen

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def test_a_model_is_quantized_with_pictures(
    kind: Kind, model: Path, rows: Path, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--scheme", "w8a8-dynamic", "--calibration", rows, "--samples", "2", "--seq-len", LENGTH)
    done = run_qtool("quantize", model, *options, "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    quantized = [name for name, tensor in after.items() if tensor.dtype == torch.int8]
    assert len(quantized) == 14  # seven in each of two layers
    towers = [name for name in before if "vis" in name or "projector" in name]
    assert towers
    assert all(torch.equal(after[name], before[name]) for name in towers)
    report = json.loads((tmp_path / "out" / "qtool.json").read_text())
    assert report["calibration"]["source"] == "rows.jsonl"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image", "path": "https://example.com/a.png"}, "must be the path of a local file"),
        ({"type": "image", "image": "data:image/png;base64,AAAA"}, "must be the path of a local file"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "must be the path of a local file"),
        ({"type": "image", "path": "absent.png"}, "no such image file"),
        ({"type": "image", "path": "text.png"}, "not an image that can be read"),
        ({"type": "image", "path": "bomb.png"}, "not an image that can be read: .*decompression bomb"),
    ],
)
def test_pictures_that_are_not_read(part: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    _bomb(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=said):
        pictures._picture(part, tmp_path, "rows.jsonl:1")


def _bomb(file: Path) -> None:
    """A PNG whose header says 20,000 by 20,000."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def test_pictures_are_not_taken_for_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is this?"}]
    row = {"messages": [{"role": "user", "content": content}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="only `qtool quantize` with the native engine"):
        text.load(str(tmp_path / "rows.jsonl"), tiny_tokenizer, samples=1, seq_len=8, seed=0)


def test_text_without_pictures_goes_the_usual_way(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n{"text": "an image"}\n')
    assert not pictures.has_pictures(str(tmp_path / "rows.jsonl"))
    assert not pictures.has_pictures("builtin")
