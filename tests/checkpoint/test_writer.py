"""The writer: files that the safetensors library reads, and nothing at the output path until all is there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.storage import check_output
from qtool.checkpoint.writer import CheckpointWriter, Sharding
from qtool.errors import InputError, QtoolError
from qtool.files import check_free_space, disk_errors
from qtool.quant.types import QuantizedLinear

PLAIN = formats.PLAIN


def write(output: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    with CheckpointWriter(output, PLAIN, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.finish(None, {"architectures": ["X"]}, {"n": 1})


def contents(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.int8, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int64]),
            st.lists(st.integers(0, 7), max_size=3),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(11_000, 13_000),
)
def test_the_library_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, spec: list[tuple[torch.dtype, list[int]]], max_shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("out")
    tensors = {f"t{i}\u20ac": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(spec)}
    output = write(folder / "m", tensors, sharding=Sharding(max_shard_bytes, 4))
    files = sorted(output.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        assert file.stat().st_size <= max_shard_bytes
        found |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        header_size = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + header_size])
        for name, entry in header.items():
            if name != "__metadata__":  # an element must start at a multiple of its size
                assert (8 + header_size + entry["data_offsets"][0]) % tensors[name].itemsize == 0
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert (output / "model.safetensors.index.json").exists() == (len(files) > 1)
    assert set(Checkpoint.open(output).names) == set(tensors)


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.full((40, 50), float(i)) for i in range(10)}
    output = write(tmp_path / "m", tensors, sharding=Sharding(25_000, 10))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index["weight_map"]) == list(tensors)
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)}
    for name, file in index["weight_map"].items():
        with safe_open(output / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensors[name])


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    tensors = {"small": torch.ones(10), "large": torch.ones(20_000), "last": torch.ones(10)}
    output = write(tmp_path / "m", tensors, sharding=Sharding(10_000, 3))
    assert len(list(output.glob("*.safetensors"))) == 3


def test_more_tensors_than_expected(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": torch.full((2,), float(i)) for i in range(500)}
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors, sharding=Sharding(expected_tensors=1)))
    assert checkpoint.names == list(tensors)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("name", ["golden-stick", "compressed-tensors"])
def test_what_must_lie_in_one_file(tmp_path: Path, names: tuple[str, str], name: str) -> None:
    """MindFormers would take one for the other where they lie in two (see tests/checkpoint/test_readers.py)."""
    full = {"a": "model.layers.61.shared_head.norm.weight", "b": "model.norm.weight"}
    tensors = {full[names[0]]: torch.ones(4), "x": torch.ones(900), full[names[1]]: torch.zeros(4), "y": torch.ones(4)}
    form = formats.get(name)
    with CheckpointWriter(tmp_path / "m", form, sharding=Sharding(8192 + 3600 + 20, 16)) as writer:
        writer.expect(tensors)
        for tensor, value in tensors.items():
            assert tensor not in writer
            writer.add(tensor, value)
            assert tensor in writer
        writer.finish(None, {"architectures": ["DeepseekV3ForCausalLM"]}, {})
    checkpoint = Checkpoint.open(tmp_path / "m")
    files = {each: checkpoint.info(each).file.name for each in tensors}
    assert len(set(files.values())) == 2
    assert (files[full["a"]] == files[full["b"]]) == (name == "golden-stick")
    for each, value in tensors.items():
        assert torch.equal(checkpoint.tensor(each), value)


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    output = write(tmp_path / "m", {"t": table.t(), "s": table[1:, ::2]})
    loaded = load_file(output / "model.safetensors")
    assert torch.equal(loaded["t"], table.t())
    assert torch.equal(loaded["s"], table[1:, ::2])


def test_a_whole_model_is_carried_over(tmp_path: Path, tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    config = source.config | {"quantization_config": {"quant_method": "old"}}
    with CheckpointWriter(tmp_path / "deep" / "m", PLAIN) as writer:
        for name in source.names:
            writer.add(name, source.tensor(name))
        output = writer.finish(source, config, {"recipe": "none"})
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(contents(output))
    assert (output / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    assert json.loads((output / "config.json").read_text()) == source.config
    assert json.loads((output / "qtool.json").read_text()) == {"recipe": "none"}
    assert contents(output.parent) == ["m"]


# ------------------------------------------------------------------ all or nothing


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with CheckpointWriter(tmp_path / "m", PLAIN) as writer:
            writer.add("a", torch.ones(3))
            assert contents(tmp_path) == [f".m.partial-{os.getpid()}"]
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", PLAIN) as writer:
        writer.add("a", torch.ones(3))
    assert contents(tmp_path) == []
    with pytest.raises(QtoolError, match="closed"):
        writer.add("b", torch.ones(3))


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="no tensors"):
        write(tmp_path / "m", {})
    assert contents(tmp_path) == []


def test_a_name_can_be_used_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", PLAIN) as writer:
        writer.add("a", torch.ones(3))
        with pytest.raises(QtoolError, match="before"):
            writer.add("a", torch.ones(3))


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    output = write(tmp_path / "m", {"a": torch.ones(1)})
    with pytest.raises(InputError, match="exists already"):
        CheckpointWriter(output, PLAIN)
    assert contents(tmp_path) == ["m"]


def test_overwrite_replaces_a_model_at_the_end_only(tmp_path: Path) -> None:
    output = write(tmp_path / "m", {"a": torch.ones(1)})
    (output / "old").write_text("")
    with CheckpointWriter(output, PLAIN, overwrite=True) as writer:
        writer.add("b", torch.ones(1))
        assert Checkpoint.open(output).names == ["a"]
        writer.finish(None, {}, {})
    assert Checkpoint.open(output).names == ["b"]
    assert "old" not in contents(output)
    assert contents(tmp_path) == ["m"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_overwrite_leaves_other_things_alone(tmp_path: Path, kind: str) -> None:
    output, model = tmp_path / "m", write(tmp_path / "model", {"a": torch.ones(1)})
    if kind == "file":
        output.write_text("precious")
    elif kind == "folder":
        output.mkdir()
        (output / "thesis.tex").write_text("precious")
    else:
        output.symlink_to(model)
    with pytest.raises(InputError, match="not a model folder"):
        CheckpointWriter(output, PLAIN, overwrite=True)


def test_output_and_source_must_not_overlap(tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"a": torch.ones(1)})
    for output in (source, source / "quantized", tmp_path):
        with pytest.raises(InputError, match="overlap"):
            check_output(output, overwrite=True, source=source)


def test_an_output_that_comes_into_being_meanwhile(tmp_path: Path) -> None:
    def race() -> None:
        with CheckpointWriter(tmp_path / "m", PLAIN) as writer:
            writer.add("a", torch.ones(1))
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "theirs").write_text("")
            writer.finish(None, {}, {})

    with pytest.raises(InputError, match="exists already"):
        race()
    assert contents(tmp_path / "m") == ["theirs"]
    assert contents(tmp_path) == ["m"]


def test_two_writers_of_one_process_do_not_touch_each_other(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", PLAIN) as first:
        first.add("a", torch.ones(1))
        with CheckpointWriter(tmp_path / "m", PLAIN) as second:
            second.add("b", torch.ones(1))
        first.finish(None, {}, {})
    assert Checkpoint.open(tmp_path / "m").names == ["a"]


CHILD = """
import os, resource, signal, sys, time, torch
from qtool.checkpoint import formats
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import QtoolError
output, what = sys.argv[1:]
if what == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    with CheckpointWriter(output, formats.PLAIN) as writer:
        for i in range(100):
            writer.add(f"t{i}", torch.ones(25_000))
            if i == 50 and what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if i == 50 and what == "wait":
                print("ready", flush=True)
                while True:  # a signal just before a single long wait would not end it
                    time.sleep(0.05)
        writer.finish(None, {}, {})
except QtoolError as error:
    print(error, "|", error.hint)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def child(qtool_environment: dict[str, str]) -> Callable[[Path, str], subprocess.Popen[str]]:
    def start(output: Path, what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(output), what]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=qtool_environment)

    return start


def test_kill_9_leaves_nothing_at_the_output_and_the_next_writer_tidies_up(
    tmp_path: Path, child: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    process = child(tmp_path / "m", "kill")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert contents(tmp_path) == [f".m.partial-{process.pid}"]
    write(tmp_path / "m", {"a": torch.ones(1)})
    assert contents(tmp_path) == ["m"]


def test_ctrl_c_removes_what_was_written(tmp_path: Path, child: Callable[[Path, str], subprocess.Popen[str]]) -> None:
    process = child(tmp_path / "m", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert contents(tmp_path) == [f".m.partial-{process.pid}"]
    with CheckpointWriter(tmp_path / "m", PLAIN):
        assert len(contents(tmp_path)) == 2  # a living writer's folder stays
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT
    assert contents(tmp_path) == []


def test_a_file_size_limit_is_a_clear_error(
    tmp_path: Path, child: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    process = child(tmp_path / "m", "limit")
    message, _ = process.communicate()
    assert process.returncode == 1
    assert str(tmp_path / "m") in message
    assert "100,000 bytes could not be written" in message
    assert "ulimit" in message
    assert contents(tmp_path) == []


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="no space left: 123,456 bytes") as caught, disk_errors(tmp_path / "m", 123456):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 1
    assert caught.value.where == str(tmp_path / "m")


def test_a_replacement_that_was_cut_in_two_is_undone(tmp_path: Path) -> None:
    old = write(tmp_path / "m", {"a": torch.ones(1)})
    old.rename(tmp_path / ".m.replaced-1")  # as if killed after the old model stepped aside
    (tmp_path / ".m.partial-1").mkdir()
    with pytest.raises(InputError, match="exists already"):
        CheckpointWriter(tmp_path / "m", PLAIN)
    assert contents(tmp_path) == ["m"]
    assert Checkpoint.open(tmp_path / "m").names == ["a"]


def test_check_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(QtoolError, match="needs 1,000,000,000,000,000,000 bytes"):
        check_free_space(tmp_path / "not" / "yet", 10**18)


def test_siblings_must_share_their_input_scale(tmp_path: Path, random_layer: Callable[..., QuantizedLinear]) -> None:
    layer = random_layer()
    other = QuantizedLinear(layer.scheme, layer.weight, layer.weight_scale, None, 0.02, -37)
    with CheckpointWriter(tmp_path / "m", formats.get("compressed-tensors")) as writer:
        writer.add_linear("model.layers.0.self_attn.q_proj", layer, torch.bfloat16)
        writer.add_linear("model.layers.1.self_attn.k_proj", other, torch.bfloat16)
        with pytest.raises(QtoolError, match="siblings"):
            writer.add_linear("model.layers.0.self_attn.v_proj", other, torch.bfloat16)
