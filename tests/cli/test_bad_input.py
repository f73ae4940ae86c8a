"""What `qtool quantize` says to bad input: every case through the real command line, in a process of its own.

Run as a script, this file prints its table of messages and exit codes as Markdown.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from tests.launcher import Launcher

SHARD = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


@dataclass
class Scene:
    """One case's folder, with a model to spoil.

    Attributes:
        folder: everything of the case; the command runs in it.
        model: a copy of a good model.
        output: where the result would go.
        prepare: Python that the command's process runs before it becomes qtool.
        interfere: what happens to the process while it runs.
    """

    folder: Path
    model: Path
    output: Path
    prepare: str = ""
    interfere: Callable[[subprocess.Popen[str], Scene], None] | None = None
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def command(self, *options: str | Path, samples: int = 2, seq_len: int = 16) -> list[str]:
        """The cheapest `quantize` of the model, with further options."""
        size = ("--samples", str(samples), "--seq-len", str(seq_len))
        return ["quantize", str(self.model), "--output", str(self.output), *size, *map(str, options)]

    def config(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def tensors(self, change: Callable[[dict[str, Any]], None]) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(self.model / SHARD)
        change(tensors)
        save_file(tensors, self.model / SHARD, metadata={"format": "pt"})

    def recipe(self, policies: str) -> Path:
        """A recipe file of one scheme; `policies` is its YAML list."""
        return self.file("mine.yaml", f"name: mine\ndescription: mine\nschemes:\n  w8a8:\n{policies}")


Row = tuple[str, str, int]
Spoil = Callable[[Scene], list[str]]


@dataclass(frozen=True)
class Case:
    """A bad input: what it is called, how it is made, and what the command must say and return."""

    name: str
    spoil: Spoil
    code: int
    says: tuple[str, ...]


CASES: list[Case] = []


def case(name: str, code: int, *says: str) -> Callable[[Spoil], Spoil]:
    def add(spoil: Spoil) -> Spoil:
        CASES.append(Case(name, spoil, code, says))
        return spoil

    return add


# ------------------------------------------------------------ the model's folder


@case("missing folder", 2, "nowhere")
def _(scene: Scene) -> list[str]:
    scene.model = scene.folder / "nowhere"
    return scene.command()


@case("a file instead of a folder", 2, "model.safetensors")
def _(scene: Scene) -> list[str]:
    scene.model = scene.model / SHARD
    return scene.command()


@case("no path on standard input", 2, "standard input")
def _(scene: Scene) -> list[str]:
    return ["quantize", "-", *scene.command()[2:]]


@case("no config.json", 2, "config.json")
def _(scene: Scene) -> list[str]:
    (scene.model / "config.json").unlink()
    return scene.command()


@case("config.json is cut off", 2, "config.json")
def _(scene: Scene) -> list[str]:
    (scene.model / "config.json").write_text('{"model_type": "llama", ')
    return scene.command()


@case("unknown architecture", 2, "zebra", "config.json")
def _(scene: Scene) -> list[str]:
    scene.config(model_type="zebra", architectures=["ZebraForCausalLM"])
    return scene.command()


@case("an architecture without a decoder", 2, "config.json")
def _(scene: Scene) -> list[str]:
    scene.config(model_type="t5", architectures=["T5ForConditionalGeneration"])
    return scene.command()


@case("config.json of another model", 2, "tensor model.", "shape", "config.json")
def _(scene: Scene) -> list[str]:
    scene.config(hidden_size=96)
    return scene.command()


@case("config.json with nonsense sizes", 2, "config.json")
def _(scene: Scene) -> list[str]:
    scene.config(num_attention_heads="four")
    return scene.command()


@case("the model's own code without --trust-remote-code", 2, "trust-remote-code")
def _(scene: Scene) -> list[str]:
    (scene.model / "modeling_mine.py").write_text(f"open({str(scene.folder / 'executed')!r}, 'w')\n")
    scene.config(
        model_type="mine",
        auto_map={"AutoConfig": "modeling_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"},
    )
    return scene.command()


@case("already quantized", 2, "already quantized", "hqq")
def _(scene: Scene) -> list[str]:
    scene.config(quantization_config={"quant_method": "hqq"})
    return scene.command()


@case("tokenizer missing", 2, "tokenizer")
def _(scene: Scene) -> list[str]:
    for file in scene.model.glob("tokenizer*"):
        file.unlink()
    return scene.command()


# ------------------------------------------------------------ its weights


@case("truncated safetensors", 2, SHARD)
def _(scene: Scene) -> list[str]:
    data = (scene.model / SHARD).read_bytes()
    (scene.model / SHARD).write_bytes(data[: len(data) // 2])
    return scene.command()


@case("empty safetensors", 2, SHARD)
def _(scene: Scene) -> list[str]:
    (scene.model / SHARD).write_bytes(b"")
    return scene.command()


@case("corrupt safetensors header", 2, SHARD)
def _(scene: Scene) -> list[str]:
    data = bytearray((scene.model / SHARD).read_bytes())
    data[8:40] = b"\xff" * 32
    (scene.model / SHARD).write_bytes(data)
    return scene.command()


@case("safetensors header of 2^60 bytes", 2, SHARD)
def _(scene: Scene) -> list[str]:
    data = (scene.model / SHARD).read_bytes()
    (scene.model / SHARD).write_bytes((2**60).to_bytes(8, "little") + data[8:])
    return scene.command()


def index(scene: Scene, file: str) -> None:
    """An index that has half of the tensors in `file`."""
    from safetensors import safe_open

    with safe_open(scene.model / SHARD, "pt") as opened:
        names = sorted(opened.keys())
    (scene.model / SHARD).rename(scene.model / "model-00001-of-00002.safetensors")
    weight_map = {name: "model-00001-of-00002.safetensors" if i % 2 else file for i, name in enumerate(names)}
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (scene.model / "model.safetensors.index.json").write_text(json.dumps(content))


@case("index names a missing shard", 2, "model-00002-of-00002.safetensors")
def _(scene: Scene) -> list[str]:
    index(scene, "model-00002-of-00002.safetensors")
    return scene.command()


@case("index names a file outside the folder", 2, "../outside.safetensors")
def _(scene: Scene) -> list[str]:
    shutil.copy(scene.model / SHARD, scene.folder / "outside.safetensors")
    index(scene, "../outside.safetensors")
    return scene.command()


@case("weights as pickle only", 2, "pytorch_model.bin")
def _(scene: Scene) -> list[str]:
    (scene.model / SHARD).rename(scene.model / "pytorch_model.bin")
    return scene.command()


@case("unreadable weights", 2, SHARD, "ermission denied")
def _(scene: Scene) -> list[str]:
    (scene.model / SHARD).chmod(0)
    scene.prepare = WITHOUT_PRIVILEGES
    return scene.command()


@case("a tensor is missing", 2, UP_PROJ)
def _(scene: Scene) -> list[str]:
    scene.tensors(lambda tensors: tensors.pop(UP_PROJ))
    return scene.command()


@case("integer weights", 2, Q_PROJ, "I8")
def _(scene: Scene) -> list[str]:
    import torch

    scene.tensors(lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.int8)}))
    return scene.command()


@case("integer embeddings", 2, "model.embed_tokens.weight", "I32")
def _(scene: Scene) -> list[str]:
    import torch

    name = "model.embed_tokens.weight"
    scene.tensors(lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    return scene.command()


def poison(tensor: str, value: float) -> Spoil:
    def spoil(scene: Scene) -> list[str]:
        def change(tensors: dict[str, Any]) -> None:
            tensors[tensor].view(-1)[5] = value

        scene.tensors(change)
        return scene.command()

    return spoil


case("a NaN weight", 2, Q_PROJ, "NaN")(poison(Q_PROJ, float("nan")))
case("an infinite weight", 2, UP_PROJ, "infinite")(poison(UP_PROJ, float("-inf")))
case("a NaN embedding", 2, "model.embed_tokens.weight", "NaN")(poison("model.embed_tokens.weight", float("nan")))
case("a NaN in the output projection", 2, "lm_head.weight", "NaN")(poison("lm_head.weight", float("nan")))


# ------------------------------------------------------------ calibration


@case("too little calibration text", 2, "few.txt", "missing", "--seq-len")
def _(scene: Scene) -> list[str]:
    return scene.command("--calibration", scene.file("few.txt", "a few words"))


@case("empty calibration file", 2, "empty.txt")
def _(scene: Scene) -> list[str]:
    return scene.command("--calibration", scene.file("empty.txt", ""))


@case("binary calibration file", 2, "binary.txt")
def _(scene: Scene) -> list[str]:
    return scene.command("--calibration", scene.file("binary.txt", bytes(range(256)) * 64))


@case("no such calibration file", 2, "nowhere.txt")
def _(scene: Scene) -> list[str]:
    return scene.command("--calibration", "nowhere.txt")


@case("calibration file of unknown kind", 2, "text.docx", ".jsonl")
def _(scene: Scene) -> list[str]:
    return scene.command("--calibration", scene.file("text.docx", "word " * 1000))


@case("a broken line in .jsonl", 2, "lines.jsonl", "2")
def _(scene: Scene) -> list[str]:
    return scene.command("--calibration", scene.file("lines.jsonl", '{"text": "fine"}\n{"text": \n'))


# ------------------------------------------------------------ recipe


@case("bad YAML", 2, "mine.yaml:2")
def _(scene: Scene) -> list[str]:
    return scene.command("--recipe", scene.file("mine.yaml", "name: mine\n\tdescription: tabs\n"))


@case("YAML that runs code", 2, "line 2: description", "python/object")
def _(scene: Scene) -> list[str]:
    call = f"!!python/object/apply:os.system ['touch {scene.folder / 'executed'}']"
    return scene.command("--recipe", scene.file("mine.yaml", f"name: mine\ndescription: {call}\n"))


@case("unknown recipe key", 2, "mine.yaml:5", "smothing", "smoothing")
def _(scene: Scene) -> list[str]:
    return scene.command("--recipe", scene.recipe("    - {layers: '.*', smothing: osl}\n"))


@case("bad regex in a recipe", 2, "mine.yaml:5", "layers", "regular expression")
def _(scene: Scene) -> list[str]:
    return scene.command("--recipe", scene.recipe("    - layers: '(unclosed'\n"))


@case("wrong value in a recipe", 2, "mine.yaml:5", "rounding", "stochastic")
def _(scene: Scene) -> list[str]:
    return scene.command("--recipe", scene.recipe("    - {layers: '.*', rounding: stochastic}\n"))


@case("a recipe that skips everything", 2, "mine", "no linear layer")
def _(scene: Scene) -> list[str]:
    return scene.command("--recipe", scene.recipe("    - {layers: 'self_attn'}\n"))


@case("q, k, v with different schemes", 2, "qkv_proj", "q_proj W8A8 static", "v_proj W8A8 dynamic")
def _(scene: Scene) -> list[str]:
    policies = "    - {layers: '.*q_proj', activations: {mode: static}}\n    - {layers: '.*proj'}\n"
    return scene.command("--recipe", scene.recipe(policies), "--format", "golden-stick")


@case("unknown recipe", 2, "lama3", "llama3")
def _(scene: Scene) -> list[str]:
    return scene.command("--recipe", "lama3")


@case("unknown scheme", 2, "w4a4", "w8a8-dynamic")
def _(scene: Scene) -> list[str]:
    return scene.command("--scheme", "w4a4")


# ------------------------------------------------------------ command line, output, machine


@case("unknown format", 2, "--format", "gguf", "golden-stick")
def _(scene: Scene) -> list[str]:
    return scene.command("--format", "gguf")


@case("zero samples", 2, "--samples", "1")
def _(scene: Scene) -> list[str]:
    return scene.command(samples=0)


@case("a device that is not there", 2, "npu", "--device")
def _(scene: Scene) -> list[str]:
    return scene.command("--device", "npu")


@case("the output exists", 2, "out", "--overwrite")
def _(scene: Scene) -> list[str]:
    scene.output.mkdir()
    (scene.output / "thesis.txt").write_text("precious")
    return scene.command()


@case("--overwrite on a folder that is no model", 2, "out")
def _(scene: Scene) -> list[str]:
    scene.output.mkdir()
    (scene.output / "thesis.txt").write_text("precious")
    return scene.command("--overwrite")


@case("the output is the input", 2, "model")
def _(scene: Scene) -> list[str]:
    scene.output = scene.model
    return scene.command("--overwrite")


@case("the output lies below a file", 2, "file.txt", "not a folder")
def _(scene: Scene) -> list[str]:
    scene.output = scene.file("file.txt", "a file") / "out"
    return scene.command()


@case("the output's folder is read-only", 2, "can't be written", "locked")
def _(scene: Scene) -> list[str]:
    (scene.folder / "locked").mkdir(mode=0o555)
    scene.output = scene.folder / "locked" / "out"
    scene.prepare = WITHOUT_PRIVILEGES
    return scene.command()


@case("a disk that is too small", 1, "disk/out", " bytes", "Free some space")
def _(scene: Scene) -> list[str]:
    small_disk(scene, kilobytes=64)
    return scene.command()


@case("a disk that fills up", 1, "out")
def _(scene: Scene) -> list[str]:
    scene.prepare = FILE_LIMIT.format(bytes=100_000)
    return scene.command()


@case("the worker is killed", 1, "signal 9", "memory", ".log")
def _(scene: Scene) -> list[str]:
    scene.interfere = lambda process, scene: os.kill(running_worker(process, scene), signal.SIGKILL)
    return scene.command(samples=128, seq_len=128)


@case("Ctrl-C", 130, "interrupted")
def _(scene: Scene) -> list[str]:
    def interrupt(process: subprocess.Popen[str], scene: Scene) -> None:
        running_worker(process, scene)
        os.killpg(process.pid, signal.SIGINT)

    scene.interfere = interrupt
    return scene.command(samples=128, seq_len=128)


@case("SIGTERM", 143, "interrupted")
def _(scene: Scene) -> list[str]:
    def terminate(process: subprocess.Popen[str], scene: Scene) -> None:
        running_worker(process, scene)
        process.terminate()

    scene.interfere = terminate
    return scene.command(samples=128, seq_len=128)


# Makes file permissions count for root as well: drops what overrides them. Others can't do that, and needn't.
WITHOUT_PRIVILEGES = """
import ctypes
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
"""
FILE_LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))\n"


def small_disk(scene: Scene, kilobytes: int) -> None:
    """A file system of that size for the output; a limit for files where mounting one is not allowed."""
    disk = scene.folder / "disk"
    disk.mkdir()
    scene.output = disk / "out"
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        scene.cleanup.callback(subprocess.run, ["umount", str(disk)], check=True)
    else:
        scene.prepare = FILE_LIMIT.format(bytes=1024 * kilobytes)


def running_worker(process: subprocess.Popen[str], scene: Scene) -> int:
    """The worker's process id, once it has begun to write."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children and any(scene.output.parent.glob(".out.partial-*/*")):
            return int(children[0])
        time.sleep(0.01)
    raise AssertionError(f"the worker never wrote anything: {process.communicate(timeout=60)}")


# ------------------------------------------------------------ the test


@dataclass(frozen=True)
class Outcome:
    """How one case went; `changed` has every path in its folder that the command made, removed or wrote to."""

    code: int
    stdout: str
    stderr: str
    message: str
    changed: set[str]


def contents(folder: Path) -> set[tuple[str, int, int]]:
    """Every path below a folder, with size and time of change of files."""
    return {
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        if path.is_file()
        else (str(path.relative_to(folder)), 0, 0)
        for path in folder.rglob("*")
    }


def run(bad: Case, model: Path, folder: Path, environment: dict[str, str], launcher: Launcher) -> Outcome:
    """Set the scene of a case and run its command."""
    folder.mkdir()
    shutil.copytree(model, folder / "model")
    scene = Scene(folder, folder / "model", folder / "out")
    with scene.cleanup:
        command = [*bad.spoil(scene), "--quiet"]
        before = contents(folder)
        process = launcher.start(
            command,
            prepare=scene.prepare,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            if scene.interfere is not None:
                scene.interfere(process, scene)
            stdout, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
        changed = {name for name, *_ in before ^ contents(folder)}
        return Outcome(process.returncode, stdout, stderr, short(stderr, folder), changed)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
    qtool_environment: dict[str, str],
    launcher: Launcher,
) -> Iterator[dict[str, Future[Outcome]]]:
    """The selected cases; two run at a time."""
    folder = tmp_path_factory.mktemp("bad")
    environment = qtool_environment | {"OMP_NUM_THREADS": "1"}
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = [cast(Case, item.callspec.params["bad"]) for item in items if item.function is test_bad_input]
    with ThreadPoolExecutor(2) as pool:
        yield {
            bad.name: pool.submit(run, bad, tiny_llama, folder / str(number), environment, launcher)
            for number, bad in enumerate(wanted)
        }


@pytest.mark.parametrize("bad", CASES, ids=[bad.name for bad in CASES])
def test_bad_input(
    bad: Case, outcomes: dict[str, Future[Outcome]], record_property: Callable[[str, object], None]
) -> None:
    outcome = outcomes[bad.name].result()
    record_property("row", (bad.name, outcome.message, outcome.code))
    assert outcome.code == bad.code, outcome.stderr
    assert outcome.stdout == ""
    assert 1 <= len([line for line in outcome.stderr.splitlines() if line.strip()]) <= 3, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "bug in qtool" not in outcome.stderr
    for words in bad.says:
        assert words in outcome.stderr
    assert outcome.changed == set()


def short(stderr: str, folder: Path) -> str:
    """The message in one line, without the folders of this run."""
    text = " ".join(stderr.split()).replace(f"{folder}/", "").replace(str(folder), ".")
    return re.sub(r"/\S+/(\S+)\.log", "FILE.log", text)


class Table:
    """Collects the rows that the tests recorded."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [cast(Row, value) for key, value in report.user_properties if key == "row"]

    def __str__(self) -> str:
        rows = [f"| {name} | {message.replace('|', chr(92) + '|')} | {code} |" for name, message, code in self.rows]
        return "\n".join(["| input | message | exit code |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    table = Table()
    with contextlib.redirect_stdout(sys.stderr):
        failed = pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[table])
    print(table)
    sys.exit(failed)
