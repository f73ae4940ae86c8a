"""The kinds of bad input: how each is made, and what takes it.

Each is a function of a scene that returns a strategy of inputs, and what to do with one: it returns what is wrong.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import resource
import shutil
import string
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from qtool.errors import InputError, QtoolError
from tests.fuzz import outside, watch
from tests.fuzz.values import TEXTS, damaged, evil, mutated, text_of
from tests.hub import loopback
from tests.launcher import Launcher
from tests.managed import REPOSITORY, managed_python

WEIGHTS = "model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


@dataclass
class Scene:
    """Where inputs are tried.

    Attributes:
        folder: of this run alone; inputs are made below it.
        model: a good model.
        quantized: the same, quantized, in compressed-tensors.
        gguf: the same as one file.
        tokenizer: the model's.
    """

    folder: Path
    launcher: Launcher
    env: dict[str, str]
    model: Path
    quantized: Path
    gguf: Path
    tokenizer: Any
    count: int = 0
    commands: int = 0
    peak: int = 0  # bytes of memory that any one input took
    longest: float = 0.0  # seconds
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @contextlib.contextmanager
    def copy(self, of: Path | None = None) -> Iterator[Path]:
        """A folder with a copy of a model, or empty, for one input."""
        self.count += 1
        room = self.folder / f"input-{self.count}"
        room.mkdir()
        if of is not None:
            shutil.copytree(of, room / "model")
        try:
            yield room
        finally:
            shutil.rmtree(room)

    def command(self, room: Path, *arguments: object, codes: Sequence[int] = (0, 2)) -> list[str]:
        """Problems of a command in `room`, which may make nothing there but `out`, and that only when it succeeds."""
        before = _contents(room)
        done = watch.run(self.launcher, arguments, self.env, room)
        self._note(done.seconds, done.peak)
        self.commands += 1
        found = watch.problems(done, codes)
        after = _contents(room)
        if done.code == 0:
            after = {path: it for path, it in after.items() if path.parts[0] != "out"}
        if after != before:
            found.append(f"changed {sorted(map(str, before.items() ^ after.items()))[:2]}")
        if {path.name for path in self.folder.iterdir()} != {room.name}:
            found.append("wrote outside")
        return [f"{problem}: qtool {' '.join(done.arguments)}\n{done.stderr[-1500:]}" for problem in found]

    def in_process(self, action: Callable[[], object], allowed: type[Exception] = InputError) -> list[str]:
        """Problems of something that may raise nothing but one kind of error, and write nothing outside."""
        began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = []
        with outside.writes(self.folder) as written:
            try:
                action()
            except allowed:
                pass
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                import traceback

                found.append("".join(traceback.format_exception(error))[-1500:])
        found += [f"wrote outside: {path}" for path in written[:3]]
        seconds = time.process_time() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        self._note(seconds, grown)
        if seconds > watch.MOST_SECONDS:
            found.append(f"took {seconds:.0f} s")
        if grown > watch.MOST_BYTES:
            found.append(f"took {grown >> 20} MB")
        return found

    def _note(self, seconds: float, peak: int) -> None:
        self.longest, self.peak = max(self.longest, seconds), max(self.peak, peak)


Kind = Callable[[Scene], tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]]


def _contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {
        path.relative_to(folder): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def header(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """Headers of safetensors files."""
    known, rest = _header(scene.model / WEIGHTS)
    few = dict(list(known.items())[:6])

    def whole(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + rest

    good = whole(json.dumps(known).encode())
    files = st.one_of(
        mutated(known).map(lambda value: whole(json.dumps(value).encode())),
        text_of(few).map(whole),
        damaged(good, 4096),
        st.integers(0, 2**64 - 1).map(lambda length: length.to_bytes(8, "little") + good[8:]),
    )
    return files, lambda data: _inspect(scene, {WEIGHTS: data})


def index(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """Indexes, which say which file has which tensor."""
    known, _ = _header(scene.model / WEIGHTS)
    names = [name for name in known if name != "__metadata__"]
    value = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    return text_of(value), lambda data: _inspect(scene, {f"{WEIGHTS}.index.json": data})


def _inspect(scene: Scene, files: dict[str, bytes]) -> list[str]:
    """Opened and summed up; one in twenty through the command line as well."""
    from qtool.checkpoint.reader import Checkpoint
    from qtool.checkpoint.summary import summarize

    with scene.copy(scene.model) as room:
        for name, data in files.items():
            (room / "model" / name).write_bytes(data)
        found = scene.in_process(lambda: json.dumps(summarize(Checkpoint.open(room / "model"))))
        if scene.count % 20 == 0:
            found += scene.command(room, "inspect", "model")
        return found


def config(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """config.json, for everything that reads it."""
    value = json.loads((scene.model / "config.json").read_text())
    known = {
        "head_dim": 32,
        "text_config": None,
        "quantization_config": None,
        "layer_types": ["full_attention"] * 2,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "sliding_window": 64,
        "num_local_experts": 4,
        "dtype": "bfloat16",
        "num_experts_per_tok": 2,
        "torch_dtype": "float32",
        "auto_map": {"AutoConfig": "x.Y"},
        "is_encoder_decoder": False,
    }
    types = [
        "llama",
        "mixtral",
        "qwen3_moe",
        "gemma3",
        "gpt2",
        "deepseek_v3",
        "mamba",
        "t5",
        "bert",
        "phi3",
        "opt",
        "x",
    ]
    whole = st.one_of(
        text_of(value),
        st.dictionaries(st.sampled_from([*value, *known]), evil, min_size=1, max_size=2).map(
            lambda changes: json.dumps(value | changes).encode()
        ),
        st.sampled_from(types).map(lambda kind: json.dumps(value | {"model_type": kind}).encode()),
        mutated(value | known).map(lambda changed: json.dumps(changed).encode()),
    )
    commands = st.sampled_from(["quantize", "generate", "inspect", "eval"])

    def take(given: tuple[bytes, str]) -> list[str]:
        data, command = given
        with scene.copy(scene.model) as room:
            (room / "model/config.json").write_bytes(data)
            return scene.command(room, *_COMMANDS[command])

    return st.tuples(whole, commands), take


_COMMANDS: dict[str, tuple[object, ...]] = {
    "quantize": ("quantize", "model", "-o", "out", "--dry-run", "--memory", "1GB"),
    "generate": ("generate", "model", "--prompt", "x", "--runtime", "transformers", "--max-tokens", "1"),
    "inspect": ("inspect", "model"),
    "eval": ("eval", "model", "model", "--windows", "1", "--length", "8"),
    "convert": ("convert", "model", "--to", "bfloat16", "--output", "out"),
    "verify": ("download", "--verify", "model"),
    "upload": ("upload", "model", "org/name", "--dry-run"),
    "calibrate": ("quantize", "model", "-o", "out", "--calibration", "data.jsonl", "--samples", "1", "--seq-len", "8"),
    "answer": ("generate", "model", "data.jsonl", "--runtime", "transformers", "--max-tokens", "1"),
    "chat": ("generate", "model", "--prompt", "x", "--chat", "--runtime", "transformers", "--max-tokens", "1"),
}


def tokenizer(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """The tokenizer's files, and generation_config.json."""
    values = {name: json.loads((scene.model / name).read_text()) for name in TOKENIZER if (scene.model / name).exists()}
    values.setdefault("generation_config.json", {"eos_token_id": 1, "temperature": 0.5, "top_k": 5, "do_sample": True})

    def take(given: tuple[str, bytes, str]) -> list[str]:
        name, data, command = given
        with scene.copy(scene.model) as room:
            (room / "model" / name).write_bytes(data)
            return scene.command(room, *_COMMANDS[command])

    files = st.one_of([st.tuples(st.just(name), text_of(value)) for name, value in values.items()])
    return st.tuples(files, st.sampled_from(["generate", "chat"])).map(lambda it: (*it[0], it[1])), take


def quantization(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """quantization_config, whatever format it says that the tensors are in."""
    value = json.loads((scene.quantized / "config.json").read_text())
    known = value["quantization_config"]
    methods = ["compressed-tensors", "fp8", "gptq", "awq", "bitsandbytes", "golden-stick", "modelslim", "mxfp4"]
    changed = st.one_of(
        mutated(known),
        mutated(known),
        evil,
        st.tuples(st.sampled_from(methods), mutated(known)).map(lambda it: {**_object(it[1]), "quant_method": it[0]}),
        st.just({"quant_method": "fp8", "weight_block_size": [128, 128]}).flatmap(mutated),
    )

    def take(given: tuple[Any, str]) -> list[str]:
        quantization_config, command = given
        with scene.copy(scene.quantized) as room:
            text = json.dumps(value | {"quantization_config": quantization_config})
            (room / "model/config.json").write_text(text)
            return scene.command(room, *_COMMANDS[command])

    return st.tuples(changed, st.sampled_from(["inspect", "inspect", "convert", "quantize", "generate"])), take


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def own(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """What qtool itself, or a format, leaves beside weights: a stranger may have written it."""
    report = json.loads((scene.quantized / "qtool.json").read_text())
    digest = hashlib.sha256(b"{}").hexdigest()
    lock = {
        "qtool": "0",
        "hub": "huggingface",
        "endpoint": "https://x.org",
        "repo": "org/name",
        "revision": "main",
        "commit": "c" * 40,
        "files": {"config.json": {"size": 2, "sha256": digest}, "d/x.json": {"size": 2, "sha256": digest}},
    }
    described = {"model.layers.0.mlp.up_proj.weight": "W8A8", "model_quant_type": "W8A8", "version": "1.0.0"}
    files = st.one_of(
        st.tuples(st.just("qtool.json"), text_of(report)),
        st.tuples(st.just("qtool.lock.json"), text_of(lock)),
        st.tuples(
            st.sampled_from(["quant_model_description.json", "quantization_description.json"]), text_of(described)
        ),
    )
    commands = {
        "qtool.json": ["inspect", "convert", "upload", "generate", "eval"],
        "qtool.lock.json": ["verify", "inspect", "upload"],
    }

    def take(given: tuple[tuple[str, bytes], int]) -> list[str]:
        (name, data), number = given
        with scene.copy(scene.quantized) as room:
            (room / "model" / name).write_bytes(data)
            which = commands.get(name, ["inspect", "convert"])
            command = _COMMANDS[which[number % len(which)]]
            return scene.command(room, *command, codes=(0, 1, 2) if "--verify" in command else (0, 2))

    return st.tuples(files, st.integers(0, 59)), take


def data(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """Lines of text and of requests."""
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hello there, how are you today?"}]
    lines = [
        {"text": "A few words. " * 20},
        {"messages": said, "chat_template_kwargs": {"x": 1}},
        {"prompt": "x", "max_tokens": 1, "temperature": 0.5, "stop": ["a"], "seed": 1, "n": 1, "logprobs": 1},
        {"prompt": [1, 2, 3], "stop_token_ids": [1], "logit_bias": {"1": 1.0}, "id": "a"},
    ]
    content = st.lists(st.one_of([text_of(line) for line in lines]), min_size=1, max_size=3).map(b"\n".join)

    def take(given: tuple[bytes, str]) -> list[str]:
        text, command = given
        with scene.copy(scene.model) as room:
            (room / "data.jsonl").write_bytes(text)
            return scene.command(room, *_COMMANDS[command])

    return st.tuples(content, st.sampled_from(["calibrate", "answer"])), take


def files(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """Something else where a model's file belongs: a pipe, a link, a folder, nothing at all, or too much."""
    names = [
        *("config.json", "generation_config.json", WEIGHTS, f"{WEIGHTS}.index.json", "tokenizer.json", "vocab.json"),
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "merges.txt"),
        *("qtool.json", "qtool.lock.json", "quant_model_description.json", "README.md", "LICENSE"),
        *("additional_chat_templates", "additional_chat_templates/x.jinja", "preprocessor_config.json"),
    ]

    def large(file: Path) -> None:
        file.touch()
        os.truncate(file, 2 << 30)  # all of it a hole

    kinds: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "loop": lambda file: file.symlink_to(file.name),
        "dangling": lambda file: file.symlink_to("nothing"),
        "outside": lambda file: file.symlink_to("/etc/passwd"),
        "endless": lambda file: file.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "empty": Path.touch,
        "large": large,
    }
    commands = ["inspect", "quantize", "generate", "chat", "verify", "upload", "calibrate"]

    def take(given: tuple[str, str, str]) -> list[str]:
        name, kind, command = given
        with scene.copy(scene.model) as room:
            (room / "data.jsonl").write_text(json.dumps({"text": "a few words " * 20}))
            file = room / "model" / name
            file.parent.mkdir(exist_ok=True)
            file.unlink(missing_ok=True)
            kinds[kind](file)
            return scene.command(room, *_COMMANDS[command], codes=(0, 1, 2) if command == "verify" else (0, 2))

    return st.tuples(*map(st.sampled_from, (names, list(kinds), commands))), take


def gguf(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """GGUF files: damaged bytes, and metadata of other sizes and types."""
    import gguf as library

    data = scene.gguf.read_bytes()
    fields = [field for field in library.GGUFReader(scene.gguf).fields.values() if not field.name.startswith("GGUF.")]

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        found = bytearray(data)
        one = draw(st.sampled_from(fields))
        kind = one.offset + 8 + len(one.name.encode())
        if draw(st.booleans()):
            found[kind : kind + 4] = draw(st.integers(0, 14)).to_bytes(4, "little")
        else:
            number = draw(st.sampled_from([0, 1, 3, 2**31 - 1, 2**31, 2**32 - 1, 10**6]))
            found[kind + 4 : kind + 8] = number.to_bytes(4, "little")
        return bytes(found)

    def take(content: bytes) -> list[str]:
        with scene.copy() as room:
            (room / "m.gguf").write_bytes(content)
            return scene.command(room, "convert", "m.gguf", "--to", "safetensors", "--output", "out")

    return st.one_of(changed(), changed(), damaged(data, 20_000), damaged(data, len(data))), take


RECIPE: dict[str, Any] = {
    "name": "mine",
    "description": "d",
    "match": {"model_type": ["llama"], "config": {"hidden_size": [64]}},
    "schemes": {
        "w8a8": [
            {
                "layers": r".*\.mlp\.down_proj",
                "activations": {"mode": "static", "observer": {"method": "percentile", "percentile": 99.9}},
            },
            {
                "layers": r".*\.(self_attn|mlp)\..*",
                "weights": {"num_bits": 8, "strategy": "channel"},
                "clip": True,
                "smoothing": {"method": "smoothquant", "alpha": 0.5},
                "rounding": "nearest",
            },
        ]
    },
    "calibration": {"data": "builtin", "samples": 2, "seq_len": 16, "seed": 1},
    "export": {"format": "compressed-tensors", "also": ["modelslim"], "max_shard_gb": 1.0},
    "generate": {"max_tokens": 3, "temperature": 0.5, "prompts": ["x"], "logit_bias": {1: 2.0}},
}
YAML = [
    "",
    "- x",
    "a: !!int ''",
    "2024-02-31: 1",
    "a: 2024-02-31",
    "? [a]\n: b",
    "a: &x 1",
    "<<: {a: 1}",
    "a: !!python/name:os.system",
    "extends: default",
    "extends: ./r.yaml",
    "extends: [x]",
    "a: !!binary x",
    "a: 1:2:3:4",
    "\t",
    "a: 0x",
    "a: |\n  x",
    "%YAML 9.9\n---\na: 1",
    "{" * 100,
    "[" * 3000,
    "a: 'x",
    "---\n---",
    "\ufeffa: 1",
    "a: \x85",
    "a: .nan",
    "a: 1e999",
    "? ? ? x",
]


def recipe(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """Recipes: YAML, keys and values, patterns."""
    import yaml

    patterns = st.one_of(
        st.sampled_from(
            [r"(.*)*x", r"(\w+\.?)*!", "(", "a{99999}", "(?=.*)+", r"(?P<a>x)(?P=a)", "(?i)X", "[[", r"\Z", "a|*"]
        ),
        st.text("a.*+?()[]{}|\\^$0-", max_size=12),
    )

    def with_pattern(pattern: str) -> bytes:
        value = copy.deepcopy(RECIPE)
        value["schemes"]["w8a8"][0]["layers"] = pattern
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")

    texts = st.one_of(
        mutated(RECIPE).map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")),
        damaged(yaml.safe_dump(RECIPE).encode()),
        patterns.map(with_pattern),
        st.lists(st.sampled_from([*YAML, "name: x", "description: d"]), min_size=1, max_size=3)
        .map("\n".join)
        .map(str.encode),
        st.text(string.printable, max_size=40).map(str.encode),
    )

    def take(data: bytes) -> list[str]:
        from qtool.recipe import load

        with scene.copy(scene.model if scene.count % 20 == 0 else None) as room:
            (room / "r.yaml").write_bytes(data)

            def use() -> None:
                found = load.load(str(room / "r.yaml"))
                for scheme in found.schemes:
                    found.policy(scheme, "model.layers.0.mlp.experts.17.down_proj")
                load.resolved(str(room / "r.yaml"))

            problems = scene.in_process(use)
            if (room / "model").exists():
                problems += scene.command(room, *_COMMANDS["quantize"], "--recipe", "r.yaml")
            return problems

    return texts, take


def template(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """Chat templates, and conversations."""
    from qtool.calibration.template import render

    pieces = [
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m.role }}",
        "{{ m['content'] }}",
        "{% if m.role == 'user' %}",
        "{% else %}",
        "{% endif %}",
        "{{ bos_token }}",
        "{{ raise_exception('no') }}",
        "{{ messages | tojson }}",
        "{% set x = 'a' * 99999 %}",
        "{% set x = x * 99999 %}",
        "{{ x }}",
        "{{ range(99999) | list }}",
        "{% for i in range(99999) %}",
        "{{ loop.index }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ 10 ** 10 ** 8 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'x' %}",
        "{{ namespace(a=1) }}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{ strftime_now('%Y') }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ m | attr('__init__') }}",
        "{% break %}",
        "{% import os %}",
        "{{ cycler }}",
        "{{ lipsum(n=99999) }}",
        "{#",
        "{{",
        "x" * 1000,
        "{{ ('x' ~ messages) | center(10 ** 11) }}",
        "{{ messages | map(attribute='x') | list }}",
        "{{ 1 / 0 }}",
        "{{ dict(a=messages) }}",
    ]
    texts = st.one_of(
        st.lists(st.sampled_from(pieces), max_size=8).map("".join),
        st.text(max_size=30),
        st.tuples(st.just(scene.tokenizer.chat_template), st.integers(0, 200), st.sampled_from(pieces)).map(
            lambda it: it[0][: it[1]] + it[2] + it[0][it[1] :]
        ),
    )
    messages = st.one_of(
        st.just([{"role": "user", "content": "x"}]),
        st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), evil, max_size=3), max_size=3),
    )
    mine = copy.deepcopy(scene.tokenizer)

    def take(given: tuple[str, Any]) -> list[str]:
        mine.chat_template, conversation = given
        return scene.in_process(lambda: render(mine, conversation, "it", add_generation_prompt=True))

    return st.tuples(texts, messages), take


def hub(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """What Hugging Face, or who says to be it, answers about a repository."""
    import huggingface_hub.constants

    answers: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            body = answers.get("tree" if "/tree/" in self.path else "info", b"{}")
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    known = huggingface_hub.constants
    before = known.ENDPOINT, known.HF_HUB_OFFLINE
    known.ENDPOINT, known.HF_HUB_OFFLINE = f"http://127.0.0.1:{server.server_port}", False

    def restore() -> None:
        known.ENDPOINT, known.HF_HUB_OFFLINE = before
        server.shutdown()
        server.server_close()

    scene.cleanup.callback(restore)
    from qtool.hub import download
    from qtool.hub.huggingface import HuggingFace
    from qtool.hub.listing import Listing
    from qtool.hub.patience import Again
    from qtool.hub.transfer import attempt
    from qtool.hub.worker import _listing

    commit = "c0ffee" + "0" * 34
    info = {
        "id": "org/m",
        "modelId": "org/m",
        "sha": commit,
        "private": False,
        "siblings": [],
        "tags": [],
        "gated": False,
        "cardData": {"license": "x"},
        "lastModified": "2025-01-01T00:00:00.000Z",
        "downloads": 1,
        "library_name": "x",
    }
    tree = [
        {"type": "directory", "oid": "0" * 40, "size": 0, "path": "d"},
        {"type": "file", "oid": "1" * 40, "size": 3, "path": "config.json"},
        {
            "type": "file",
            "oid": "1" * 40,
            "size": 9,
            "path": "d/m.safetensors",
            "lfs": {"oid": "2" * 64, "size": 9, "pointerSize": 134},
        },
    ]
    one = HuggingFace("token")

    def take(given: tuple[bytes, bytes]) -> list[str]:
        answers["info"], answers["tree"] = given

        def use() -> None:
            try:
                found = attempt(one, lambda: _listing(one, "org/m", None))
            except Again:
                return
            listing = Listing.from_json(json.loads(json.dumps(found.to_json())))
            download.plan(listing, (), ())
            download.plan(listing, ("*",), ("x*",))

        return scene.in_process(use, QtoolError)

    good = json.dumps(info).encode(), json.dumps(tree).encode()
    return st.one_of(
        st.tuples(st.just(good[0]), text_of(tree)),
        st.tuples(text_of(info), st.just(good[1])),
        st.tuples(st.just(good[0]), text_of(tree)),
    ), take


def modelers(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """What modelers.cn, or who says to be it, answers about a repository."""
    answers: dict[str, bytes] = {}

    class Answers(loopback.ModelersHandler):
        def do_GET(self) -> None:
            kind = "tree" if "/file/" in self.path else "info"
            below = kind == "tree" and "path=" in self.path.partition("?")[2]
            self.answer(200, b'{"data": {"tree": []}}' if below else answers[kind])

    serving = contextlib.contextmanager(loopback.serve_modelers)(scene.folder.parent)
    server, env = scene.cleanup.enter_context(serving)
    server.RequestHandlerClass = Answers
    env = {**os.environ, **env, "HOME": str(scene.folder), "PYTHONPATH": str(REPOSITORY)}
    command = [managed_python("openmind-hub"), "-m", "tests.fuzz.listings"]
    child = subprocess.Popen(command, env=env, cwd=scene.folder, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL)
    assert child.stdin is not None
    assert child.stdout is not None
    scene.cleanup.callback(child.wait)
    scene.cleanup.callback(child.stdin.close)
    commit = {"commit_sha": "c0ffee" + "0" * 34, "message": "m", "created": "2025-01-01T00:00:00Z"}
    info = {"data": {"id": "1", "owner": "org", "name": "m", "visibility": "public", "labels": {}}}
    entries = [
        {"type": "dir", "path": "d", "name": "d", "size": 0},
        {"type": "file", "path": "config.json", "size": 3, "etag": "1" * 40, "is_lfs": False},
        {"type": "file", "path": "m.safetensors", "size": 9, "etag": "2" * 64, "is_lfs": True},
    ]
    tree = {"data": {"tree": entries, "last_commit": {"commit": commit}}}

    def take(given: tuple[bytes, bytes]) -> list[str]:
        assert child.stdin is not None
        assert child.stdout is not None
        answers["info"], answers["tree"] = given
        child.stdin.write(b"go\n")
        child.stdin.flush()
        said = child.stdout.readline()
        return [problem] if (problem := json.loads(said) if said else "the process has ended") else []

    good = json.dumps(info).encode(), json.dumps(tree).encode()
    return st.one_of(
        st.tuples(st.just(good[0]), text_of(tree)),
        st.tuples(st.just(good[0]), text_of(tree)),
        st.tuples(text_of(info), st.just(good[1])),
    ), take


def lines(scene: Scene) -> tuple[st.SearchStrategy[Any], Callable[[Any], list[str]]]:
    """What a worker says on its pipe."""
    import io

    from qtool.console import Console
    from qtool.workers.protocol import Lines, as_exception, decode

    events: list[Any] = [
        {"event": "progress", "stage": "s", "done": 1, "total": 2, "unit": "layers"},
        {"event": "progress", "stage": "s", "done": 1, "total": 2, "unit": "bytes"},
        {"event": "warning", "message": "m"},
        {"event": "error", "type": "InputError", "what": "w", "where": None, "hint": None},
        {"event": "item", "data": {}},
        {"event": "piece", "index": 0, "text": "t"},
        {"event": "status", "text": "t"},
    ]
    said = st.one_of(
        [text_of(event) for event in events]
        + [st.binary(max_size=40), st.sampled_from(TEXTS).map(repr).map(str.encode)]
    )

    def take(data: bytes) -> list[str]:
        def use() -> None:
            for line in Lines().feed(data + b"\n"):
                try:
                    event = decode(line)
                except ValueError:
                    continue
                with contextlib.redirect_stderr(io.StringIO()), Console() as console:
                    if event["event"] == "error":
                        console.error(as_exception(event))  # type: ignore[arg-type]
                    elif event["event"] not in ("item", "piece", "result", "alive"):
                        console.event(event)

        return scene.in_process(use)

    return said, take


KINDS: dict[str, Kind] = {
    each.__name__: each
    for each in (
        header, index, config, tokenizer, quantization, own, files, data, gguf, recipe, template, hub, modelers, lines,
    )
}  # fmt: skip
PEERS = {"modelers"}  # need packages of others
IN_PROCESS = {"header": 20, "index": 20, "recipe": 20, "template": 8, "hub": 15, "modelers": 15, "lines": 60}
EXAMPLES = {**dict.fromkeys(KINDS, 4), **IN_PROCESS}  # in a sample
