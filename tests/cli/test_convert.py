"""`qtool convert`: between W8A8 formats; and a GGUF file by the gguf library becomes the model it was made from."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.conftest import quantize_folder
from tests.launcher import Launcher

__all__ = ["quantize_folder"]

LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp keeps them: pairs of rotary dimensions side by side."""
    out, columns = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, columns).swapaxes(1, 2).reshape(out, columns)


def write_gguf(model: Path, path: Path, *, without: str = "", quantize: bool = False, **extra: int) -> None:
    """`model` (a Llama) as a GGUF file, in float32 or with its matrices in Q8_0."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    tensors = {name: t.float().numpy() for name, t in load_file(model / "model.safetensors").items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if without != "head size":
        writer.add_rope_dimension_count(config["head_dim"])
    for key, value in extra.items():
        writer.add_uint16(key.replace("_", "."), value)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def add(name: str, data: np.ndarray) -> None:
        if name == without:
            return
        if quantize and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(data))

    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    add("output_norm.weight", tensors["model.norm.weight"])
    if not config["tie_word_embeddings"]:
        add("output.weight", tensors["lm_head.weight"])
    for i in range(config["num_hidden_layers"]):
        for short, long in LAYERS.items():
            data = tensors[f"model.layers.{i}.{long}.weight"]
            if short == "attn_q":
                data = rotary_order(data, config["num_attention_heads"])
            if short == "attn_k":
                data = rotary_order(data, config["num_key_value_heads"])
            add(f"blk.{i}.{short}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_llama, path)
    (path.parent / "LICENSE").write_text("the licence")
    return path


def test_the_model_comes_back_exactly(run_qtool: Any, gguf_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "deep" / "model"
    done = run_qtool("convert", gguf_file, "--to", "safetensors", "--output", output)
    assert (done.code, done.stdout) == (0, f"{output}\n"), done.stderr
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    assert (output / "LICENSE").read_text() == "the licence"
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1

    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, tiny_llama))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name

    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (output, tiny_llama))
    text = "The tokens of the list are statements.\n\n  And spaces"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (output, tiny_llama))
    ids = original(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_a_quantized_and_tied_gguf_is_dequantized(run_qtool: Any, make_model: Any, tmp_path: Path) -> None:
    import gguf
    import torch
    from safetensors.torch import load_file

    source = make_model("llama", name="tied", tie_word_embeddings=True)
    write_gguf(source, tmp_path / "tied.gguf", quantize=True)
    output = tmp_path / "model"
    done = run_qtool("convert", tmp_path / "tied.gguf", "-o", output, "--dtype", "float32", "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["output"] == str(output)
    assert result["architecture"] == "LlamaForCausalLM"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, source))
    assert "lm_head.weight" not in ours
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is True
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        expected = gguf.dequantize(gguf.quantize(theirs[name].float().numpy(), kind), kind)
        assert torch.equal(ours[name], torch.from_numpy(expected)), name


def test_an_existing_output_is_kept_unless_overwrite(run_qtool: Any, gguf_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    for options, message in (([], "exists already"), (["--overwrite"], "is not a model folder")):
        done = run_qtool("convert", gguf_file, "--output", output, *options)
        assert (done.code, done.stdout) == (2, "")
        assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (output / "mine.txt").read_text() == "mine"

    (output / "config.json").write_text("{}")
    done = run_qtool("convert", gguf_file, "--output", output, "--overwrite", "--quiet")
    assert (done.code, done.stdout, done.stderr) == (0, f"{output}\n", "")
    assert not (output / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_files(run_qtool: Any, gguf_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    data = gguf_file.read_bytes()
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_bytes(b"just some text")
    (tmp_path / "header.gguf").write_bytes(data[:20])
    (tmp_path / "metadata.gguf").write_bytes(data[:2000])
    (tmp_path / "half.gguf").write_bytes(data[: len(data) // 2])
    (tmp_path / "count.gguf").write_bytes(data[:8] + b"\xff" * 8 + data[16:])
    (tmp_path / "architecture.gguf").write_bytes(data.replace(b"llama", b"lamma"))
    write_gguf(tiny_llama, tmp_path / "lacking.gguf", without="blk.1.ffn_up.weight")
    write_gguf(tiny_llama, tmp_path / "part.gguf", split_count=3)
    write_gguf(tiny_llama, tmp_path / "disagreeing.gguf", without="head size")
    expected = {
        "empty": "not a GGUF file",
        "text": "not a GGUF file: it begins with b'just'",
        "header": "damaged or truncated",
        "metadata": "damaged or truncated",
        "half": "damaged or truncated",
        "count": "damaged or truncated",
        "architecture": "lamma",
        "lacking": "lacks tensors: model.layers.1.mlp.up_proj.weight",
        "part": "one part of a split GGUF",
        "disagreeing": "its metadata and its tensors disagree",
    }
    for name, message in expected.items():
        done = run_qtool("convert", tmp_path / f"{name}.gguf", "--output", tmp_path / "out" / "model")
        assert (name, done.code, done.stdout) == (name, 2, "")
        assert message in done.stderr, (name, done.stderr)
        assert f"{name}.gguf" in done.stderr
        assert "Traceback" not in done.stderr
        assert list((tmp_path / "out").iterdir()) == []


def test_missing_file_folder_and_option(run_qtool: Any, tmp_path: Path) -> None:
    for source, message in ((tmp_path / "no.gguf", "no such file"), (tmp_path / "no", "no such file or folder")):
        done = run_qtool("convert", source, "--output", tmp_path / "model")
        assert (done.code, done.stdout) == (2, "")
        assert message in done.stderr
    assert run_qtool("convert", tmp_path / "no.gguf").code == 2
    assert run_qtool("convert", tmp_path / "no.gguf", "--output", "x", "--to", "onnx").code == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_an_interruption_leaves_nothing(
    qtool_environment: dict[str, str], launcher: Launcher, gguf_file: Path, tmp_path: Path, number: int, code: int
) -> None:
    command = ["convert", gguf_file, "--output", tmp_path / "model", "--overwrite"]
    for _ in range(5):
        process = launcher.start(
            command, env=qtool_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert process.stderr.readline().startswith("loading")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        if process.returncode != 0:  # else it was finished before the signal came
            break
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    *before, last = err.splitlines()
    assert (process.returncode, out, last) == (code, "", "interrupted")
    assert all(line.startswith(("loading", "writing")) for line in before), err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ between W8A8 formats


@pytest.fixture
def quantized(tiny_llama: Path, tmp_path: Path, quantize_folder: Any) -> Path:
    quantize_folder(tiny_llama, tmp_path / "model", "compressed-tensors", "static")
    return tmp_path / "model"


def test_a_folder_to_another_format(run_qtool: Any, quantized: Path) -> None:
    from safetensors.torch import load_file

    done = run_qtool("convert", "-", "--to", "golden-stick", stdin=f"{quantized}\n")
    output = quantized.with_name("model-golden-stick")
    assert (done.code, done.stdout) == (0, f"{output}\n"), done.stderr
    assert "compressed-tensors to golden-stick: 14 W8A8 static layers" in done.stderr
    assert "scales unchanged" in done.stderr
    name = "model.layers.1.mlp.up_proj.weight"
    ours = load_file(output / "quant-model-00001-of-00001.safetensors")[name]
    assert ours.equal(load_file(quantized / "model.safetensors")[name])

    done = run_qtool("convert", output, "--to", "bfloat16", "--json", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["output"] == f"{output}-bfloat16"
    assert result["layers"] == {"W8A8 static": 14}
    summary = json.loads(run_qtool("inspect", result["output"], "--json").stdout)
    assert (summary["format"], summary["dtype"]) == ("float", "BF16")


def test_wrong_usage_with_a_folder(run_qtool: Any, quantized: Path, tiny_llama: Path, gguf_file: Path) -> None:
    (quantized.parent / "there").mkdir()
    (quantized.parent / "empty").mkdir()
    for arguments, message in (
        ((quantized,), "a folder can be converted to several formats"),
        ((quantized, "--to", "safetensors"), "a folder can be converted to several formats"),
        ((quantized, "--to", "modelslim", "--dtype", "float16"), "a folder keeps its dtype"),
        ((quantized, "--to", "modelslim", "--output", quantized.parent / "there"), "exists already"),
        ((quantized, "--to", "modelslim", "--output", quantized / "inside"), "output and input overlap"),
        ((quantized, "--to", "compressed-tensors"), "is compressed-tensors already"),
        ((quantized.parent / "empty", "--to", "modelslim"), "no config.json"),
        ((tiny_llama, "--to", "modelslim", "--output", quantized.parent / "out"), "not quantized"),
        ((gguf_file, "--to", "golden-stick", "--output", quantized.parent / "out"), "a GGUF file, and can't become"),
    ):
        done = run_qtool("convert", *arguments)
        assert (done.code, done.stdout) == (2, ""), arguments
        assert message in done.stderr
        assert len(done.stderr.splitlines()) <= 3
    assert sorted(path.name for path in quantized.parent.iterdir()) == ["empty", "model", "there"]


def test_hostile_names_stay_names(run_qtool: Any, quantized: Path) -> None:
    """In a checkpoint a name is a key and never a path, and a terminal isn't told to do anything."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(quantized / "model.safetensors")
    hostile = {"../../../tmp/evil.weight": torch.ones(3), "\x1b]0;evil\x07\n.weight": torch.ones(3), "": torch.ones(1)}
    save_file(tensors | hostile, quantized / "model.safetensors", metadata={"format": "pt"})
    done = run_qtool("convert", quantized, "--to", "golden-stick")
    assert done.code == 0, done.stderr
    output = quantized.with_name("model-golden-stick")
    written = load_file(output / "quant-model-00001-of-00001.safetensors")
    assert hostile.keys() <= written.keys()
    assert sorted(path.name for path in quantized.parent.iterdir()) == ["model", "model-golden-stick"]
    assert "\x1b" not in done.stderr


def test_a_disk_that_is_too_small(qtool_environment: dict[str, str], quantized: Path) -> None:
    """A limit on the size of files stands in for it: the system refuses to write in the middle."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "from qtool.__main__ import main\nmain()"
    )
    command = [sys.executable, "-c", code, "convert", str(quantized), "--to", "golden-stick", "--quiet"]
    done = subprocess.run(command, env=qtool_environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no space left" in done.stderr
    assert [path.name for path in quantized.parent.iterdir()] == ["model"]


def test_a_killed_conversion_leaves_all_or_nothing(
    qtool_environment: dict[str, str], launcher: Launcher, quantized: Path
) -> None:
    command = ["convert", quantized, "--to", "golden-stick"]
    process = launcher.start(command, env=qtool_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("converting")
    process.kill()
    process.communicate(timeout=60)
    output = quantized.with_name("model-golden-stick")
    there = {path.name for path in output.iterdir()} if output.exists() else None
    done = launcher.run([*command, "--overwrite"], env=qtool_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert there in (None, {path.name for path in output.iterdir()})
    assert sorted(path.name for path in quantized.parent.iterdir()) == ["model", "model-golden-stick"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", 10**6, "its metadata speak of 1000000 blocks"),
        ("block_count", 1, "its metadata speak of 1 blocks"),
        ("embedding_length", 10**6, "its metadata make it 1000000 wide"),
        ("feed_forward_length", 2**31, "no tensor has a side longer than"),
        ("attention.head_count", 2**31, "no tensor has a side longer than"),
        ("context_length", 2**31, "takes no more than"),
        ("general.architecture", "falcon", "its metadata speak of None blocks"),
    ],
)
def test_metadata_of_other_tensors_are_refused_before_anything_is_built(
    tiny_llama: Path, tmp_path: Path, run_qtool: Any, key: str, value: Any, message: str
) -> None:
    import gguf

    source = tmp_path / "m.gguf"
    write_gguf(tiny_llama, source)
    data = bytearray(source.read_bytes())
    if isinstance(value, str):  # of the same length, in place
        data = data.replace(b"\5\0\0\0\0\0\0\0llama", len(value).to_bytes(8, "little") + value.encode())
    else:
        field = gguf.GGUFReader(source).fields[f"llama.{key}"]
        data[(start := field.offset + 8 + len(field.name) + 4) : start + 4] = value.to_bytes(4, "little")
    source.write_bytes(data)
    done = run_qtool("convert", source, "--to", "safetensors", "--output", tmp_path / "out")
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_lengths_that_lead_out_of_a_gguf_file_are_no_reading_for_ever(
    tiny_llama: Path, tmp_path: Path, run_qtool: Any
) -> None:
    import gguf

    source = tmp_path / "m.gguf"
    write_gguf(tiny_llama, source)
    data = bytearray(source.read_bytes())
    field = gguf.GGUFReader(source).fields["llama.context_length"]
    kind = field.offset + 8 + len(field.name)
    data[kind : kind + 16] = struct.pack("<IIQ", 9, 4, 1 << 62)  # an array of so many numbers
    source.write_bytes(data)
    done = run_qtool("convert", source, "--to", "safetensors", "--output", tmp_path / "out")
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert "leads out of the file" in done.stderr
