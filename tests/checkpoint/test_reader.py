"""The reader, against the safetensors library and against whatever damage there is."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from qtool.checkpoint import formats
from qtool.checkpoint.companions import companions
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError, QtoolError

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit: NaN and all."""
    bits_a, bits_b = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_a, bits_b)


def small_file() -> bytes:
    return save(
        {
            "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
            "b": torch.arange(5, dtype=torch.int8),
            "c": torch.zeros(0, 3, dtype=torch.bfloat16),
            "d": torch.tensor(7, dtype=torch.int64),
        },
        metadata={"format": "pt"},
    )


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_every_dtype_is_read_as_the_library_wrote_it(make_folder: Callable[..., Path]) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for dtype in DTYPES:
        raw = torch.randint(0, 256, (3, 5, 8), generator=generator, dtype=torch.uint8)
        tensors[str(dtype)] = raw > 127 if dtype == torch.bool else raw.view(dtype)
    folder = make_folder({"model.safetensors": save(tensors)})
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.names) == set(tensors)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert same(checkpoint.tensor(name), tensor)
        assert checkpoint.info(name).shape == tensor.shape
        assert checkpoint.info(name).nbytes == tensor.nbytes


def test_names_are_in_the_order_of_their_bytes(make_folder: Callable[..., Path]) -> None:
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "early": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    checkpoint = Checkpoint.open(make_folder({"model.safetensors": with_header(header, b"abcde")}))
    assert checkpoint.names == ["early", "late"]
    assert bytes(checkpoint.tensor("late").tolist()) == b"de"


def test_a_tensor_at_an_odd_offset_is_read(make_folder: Callable[..., Path]) -> None:
    header = {
        "byte": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "float": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    data = b"\x05" + struct.pack("<2f", 1.5, -2.25)
    checkpoint = Checkpoint.open(make_folder({"model.safetensors": with_header(header, data)}))
    assert checkpoint.tensor("float").tolist() == [1.5, -2.25]


def test_tensors_are_fresh_memory(make_folder: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(make_folder({"model.safetensors": small_file()}))
    checkpoint.tensor("a.weight").zero_()
    assert checkpoint.tensor("a.weight").sum() == 66
    with open("/proc/self/maps") as maps:
        assert str(checkpoint.path) not in maps.read()


@pytest.mark.parametrize("ids", [[], [0], [2, 2, 0], [6, 1, 2, 3, 6, 0], torch.tensor([4, 5])])
def test_rows(make_folder: Callable[..., Path], ids: list[int]) -> None:
    table = torch.randn(7, 3, 2).bfloat16()
    checkpoint = Checkpoint.open(make_folder({"model.safetensors": save({"table": table})}))
    assert same(checkpoint.rows("table", ids), table[torch.as_tensor(ids, dtype=torch.int64)])


@pytest.mark.parametrize("ids", [[7], [-1], [0, 10**12]])
def test_rows_that_are_not_there(make_folder: Callable[..., Path], ids: list[int]) -> None:
    checkpoint = Checkpoint.open(make_folder({"model.safetensors": save({"table": torch.zeros(7, 3)})}))
    with pytest.raises(InputError, match="row"):
        checkpoint.rows("table", ids)


def test_a_real_model(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    expected = load_file(tiny_llama / "model.safetensors")
    assert formats.of(checkpoint) is formats.PLAIN
    assert set(checkpoint.names) == set(expected)
    assert all(same(checkpoint.tensor(name), tensor) for name, tensor in expected.items())
    assert formats.of(checkpoint).read_linear(checkpoint, "model.layers.0.mlp.up_proj") is None
    names = {str(file) for file in companions(checkpoint)}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert not names & {"config.json", "model.safetensors"}


# ------------------------------------------------------------------ shards


def sharded(weight_map: dict[str, Any] | None = None, **files: Any) -> dict[str, Any]:
    first = save({"a": torch.ones(2), "b": torch.ones(3)})
    second = save({"c": torch.ones(4)})
    usual = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    return {
        "m-1.safetensors": first,
        "m-2.safetensors": second,
        "model.safetensors.index.json": {"weight_map": usual if weight_map is None else weight_map},
    } | {name.replace("__", "."): value for name, value in files.items()}


def test_shards(make_folder: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(make_folder(sharded()))
    assert checkpoint.names == ["a", "b", "c"]
    assert checkpoint.info("c").file.name == "m-2.safetensors"
    assert checkpoint.tensor("c").sum() == 4


def test_the_index_decides_about_duplicates(make_folder: Callable[..., Path]) -> None:
    files = sharded() | {"m-2.safetensors": save({"c": torch.ones(4), "a": torch.zeros(2)})}
    assert Checkpoint.open(make_folder(files)).tensor("a").sum() == 2


def test_numbered_shards_without_an_index(make_folder: Callable[..., Path]) -> None:
    files = {f"model-0000{i}-of-00002.safetensors": save({f"t{i}": torch.ones(i)}) for i in (1, 2)}
    assert Checkpoint.open(make_folder(files)).names == ["t1", "t2"]


@pytest.mark.parametrize(
    "shard", ["../m-1.safetensors", "/etc/passwd", "sub/m-1.safetensors", "..", "", "m-1", "a\\b.safetensors", 7, None]
)
def test_an_index_that_points_elsewhere_is_refused(make_folder: Callable[..., Path], shard: Any) -> None:
    folder = make_folder(sharded({"a": shard}))
    (folder.parent / "m-1.safetensors").write_bytes(save({"a": torch.ones(2)}))
    with pytest.raises(InputError, match=r"puts tensor 'a'") as caught:
        Checkpoint.open(folder)
    assert caught.value.where == str(folder / "model.safetensors.index.json")


def test_a_linked_shard_as_in_the_hugging_face_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(save({"a": torch.ones(2)}))
    (blobs / "2").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    for name, target in {"model.safetensors": "1", "config.json": "2", "tokenizer.json": "2"}.items():
        (snapshot / name).symlink_to(Path("../../blobs") / target)
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.tensor("a").sum() == 2
    assert [str(file) for file in companions(checkpoint)] == ["tokenizer.json"]
    (snapshot / "vocab.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match="link leads out of the model's folder") as caught:
        companions(checkpoint)
    assert caught.value.where == str(snapshot / "vocab.json")


# ------------------------------------------------------------------ what is wrong with a folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": None}, "no config.json"),
        ({"config.json": b"{"}, "not valid JSON"),
        ({"config.json": b"\xff\xfe"}, "not valid JSON"),
        ({"config.json": b"[" * 100_000}, "not valid JSON"),
        ({"config.json": b"[]"}, "JSON object"),
        ({}, "no safetensors"),
        ({"pytorch_model.bin": b"x"}, "no safetensors"),
        ({"model.gguf": b"GGUF"}, "no safetensors"),
        ({"a.safetensors": small_file(), "b.safetensors": small_file()}, "several safetensors files and no index"),
        ({"model-00001-of-00002.safetensors": small_file()}, "shard 2 of 00002 is missing"),
        (sharded({}), "no weight_map"),
        (sharded({"a": "m-3.safetensors"}), "names m-3.safetensors, which is not there"),
        (sharded({"a": "m-1.safetensors", "z": "m-2.safetensors"}), "holds tensor 'z', but it does not"),
        (sharded() | {"model.safetensors.index.json": b"nonsense"}, "not valid JSON"),
        (sharded({"a": "m-1.safetensors", "c": "m-2.safetensors"}) | {"m-2.safetensors": b""}, "truncated"),
    ],
)
def test_bad_folders(make_folder: Callable[..., Path], files: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint.open(make_folder(files))
    assert caught.value.where


@pytest.mark.parametrize(
    ("files", "hint"), [({"x.gguf": b""}, "qtool convert"), ({"pytorch_model.bin": b""}, "pickle"), ({}, "download")]
)
def test_other_weights_get_a_hint(make_folder: Callable[..., Path], files: dict[str, Any], hint: str) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(make_folder(files))
    assert hint in str(caught.value.hint)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    paths = {str(file): "qtool convert", "Org/Model-1.5B": "qtool download", str(tmp_path / "a" / "b"): "Check"}
    for path, hint in paths.items():
        with pytest.raises(InputError) as caught:
            Checkpoint.open(path)
        assert hint in str(caught.value.hint)
    for path in ("bad\0name", "x" * 5000):
        with pytest.raises(InputError):
            Checkpoint.open(path)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(make_folder: Callable[..., Path]) -> None:
    folder = make_folder({})
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        Checkpoint.open(folder)


def test_a_file_that_shrinks_after_opening(make_folder: Callable[..., Path]) -> None:
    folder = make_folder({"model.safetensors": save({"a": torch.ones(100)})})
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model.safetensors", 200)
    with pytest.raises(InputError, match="shorter"):
        checkpoint.tensor("a")


@pytest.mark.parametrize("target", ["nowhere", "/proc/self/mem"])  # ENOENT; EIO, at addresses where nothing is
def test_a_disk_that_fails_after_opening_is_no_bad_input(make_folder: Callable[..., Path], target: str) -> None:
    folder = make_folder({"model.safetensors": save({"a": torch.ones(100)})})
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    with pytest.raises(QtoolError, match=r"can't be read any more: (No such file|Input/output error)") as caught:
        checkpoint.tensor("a")
    assert not isinstance(caught.value, InputError)
    assert caught.value.where == str(folder / "model.safetensors")


# ------------------------------------------------------------------ what is wrong with a file

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        with_header({"a": GOOD}, b"x" * 7),
        with_header({"a": GOOD}, b"x" * 9),
        with_header({"a": GOOD, "b": GOOD}, b"x" * 8),
        with_header({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}, b"x" * 12),
        with_header({"a": GOOD, "b": GOOD | {"data_offsets": [12, 20]}}, b"x" * 20),
        with_header({"a": GOOD | {"data_offsets": [8, 0]}}, b"x" * 8),
        with_header({"a": GOOD | {"data_offsets": [0, 8, 8]}}, b"x" * 8),
        with_header({"a": GOOD | {"data_offsets": [0, 10**30]}}, b"x" * 8),
        with_header({"a": GOOD | {"data_offsets": [-8, 0]}}, b"x" * 8),
        with_header({"a": GOOD | {"data_offsets": [0.0, 8.0]}}, b"x" * 8),
        with_header({"a": GOOD | {"shape": [3]}}, b"x" * 8),
        with_header({"a": GOOD | {"shape": [-2]}}, b"x" * 8),
        with_header({"a": GOOD | {"shape": [True, 2]}}, b"x" * 8),
        with_header({"a": GOOD | {"shape": [2**62, 0], "data_offsets": [0, 0]}}),
        with_header({"a": GOOD | {"shape": 2}}, b"x" * 8),
        with_header({"a": GOOD | {"dtype": "F33"}}, b"x" * 8),
        with_header({"a": GOOD | {"dtype": ["F32"]}}, b"x" * 8),
        with_header({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8),
        with_header({"a": []}),
        with_header({"a": GOOD, "__metadata__": {"n": 1}}, b"x" * 8),
        with_header({"a": GOOD, "__metadata__": []} | {"__metadata__": [1]}, b"x" * 8),
        with_header(b'{"a":1,"a":1}'),
        with_header(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"x" * 8),
        with_header(b'{"a":NaN}'),
        with_header(b'{"a":' + b"[" * 200_000),
        with_header(b'{"a":' + b"9" * 5000 + b"}"),
        with_header(b"[]"),
        with_header(b" {}"),
        with_header(b"\xff{}"),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100_000_001) + b"{}",
        b"",
        b"GGUF",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n",
    ],
    ids=lambda content: repr(content[8:60]),
)
def test_bad_files(make_folder: Callable[..., Path], content: bytes) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(make_folder({"model.safetensors": content}))
    assert str(caught.value.where).endswith("model.safetensors")


def test_every_truncation_is_noticed(make_folder: Callable[..., Path]) -> None:
    content = small_file()
    folder = make_folder({"model.safetensors": content})
    for length in range(len(content)):
        (folder / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(InputError):
            Checkpoint.open(folder)


FUZZED = small_file()
HEADER_END = 8 + int.from_bytes(FUZZED[:8], "little")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from(["set", "flip", "insert", "delete"]),
)
def test_mutated_headers(changes: list[tuple[int, int]], kind: str) -> None:
    content = bytearray(FUZZED)
    for position, value in changes:
        if kind == "insert":
            content.insert(position, value)
        elif kind == "delete":
            del content[position]
        else:
            content[position] = value if kind == "set" else content[position] ^ (1 << value % 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(content)
        try:
            checkpoint = Checkpoint.open(folder)
            ours = {name: checkpoint.tensor(name) for name in checkpoint.names}
        except InputError:
            return
        try:
            theirs = load_file(folder / "model.safetensors")
        except SafetensorError as error:
            pytest.fail(f"the library refuses what we read: {error}")
        assert set(ours) == set(theirs)
        assert all(same(ours[name], theirs[name]) for name in ours)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES[1:]), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    )
)
def test_whatever_the_library_writes_is_read(spec: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in spec.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        save_file(tensors, folder / "model.safetensors")
        checkpoint = Checkpoint.open(folder)
        assert set(checkpoint.names) == set(tensors)
        assert all(same(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())
