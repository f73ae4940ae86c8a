"""Every family that a recipe ships for, in every scheme, through its runtimes' own loading code.

    python -m tests.checkpoint.readings [RUNTIME ...]

runs all readers, or those of some runtimes, and writes what they found into qtool/runtimes/readings.py. What they need
is downloaded once, into the user's cache; `make docs` then shows it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.runtimes import readings, table, vllm_mindspore
from qtool.runtimes.readings import Counts, Reading
from tests.checkpoint import served
from tests.families import train_tokenizer
from tests.managed import REPOSITORY, VLLM_ASCEND, managed_python, unpacked

HERE = Path(__file__).parent
Folders = dict[tuple[str, str], Path]


@dataclass(frozen=True)
class Reader:
    """A script that has a runtime's code read checkpoints.

    Attributes:
        runtime, format: as of a `Reading`.
        script: beside this file.
        packages: without which it can't be imported; unpacked into the user's cache.
        python: name of the environment that has what else it needs; the tests' own otherwise.
        architectures: that it can build here.
        takes: whether it is the way that qtool takes for an architecture and a scheme.
    """

    runtime: str
    format: str
    script: str
    packages: tuple[str, ...] = ()
    python: str | None = None
    architectures: tuple[str, ...] = ()
    takes: Callable[[str, str], bool] = lambda architecture, scheme: True


def _is_native(architecture: str, scheme: str) -> bool:
    kinds = vllm_mindspore.reading(architecture, dynamic=scheme != "w8a8-static")
    return kinds[:1] == ["native"]


def _is_mindformers(architecture: str, scheme: str) -> bool:
    return not _is_native(architecture, scheme)


# In vLLM GLM-4V needs torchvision, which no build of PyPI's has for the CPU's torch.
_BUILT = tuple(name for name in served.ARCHITECTURES if name != "Glm4vForConditionalGeneration")
_EXPERTS = ("DeepseekV3ForCausalLM", "MixtralForCausalLM")
READERS = (
    Reader("vllm", "compressed-tensors", "vllm_reads.py", architectures=_BUILT),
    Reader("transformers", "compressed-tensors", "transformers_reads.py", architectures=served.ARCHITECTURES),
    Reader(
        "sglang",
        "compressed-tensors",
        "sglang_reads.py",
        ("sglang==0.5.23",),
        # DeepSeek's model asks for CUDA before it looks at its experts; TeleChat2 isn't there.
        architectures=tuple(name for name in _BUILT if name not in ("DeepseekV3ForCausalLM", "TeleChat2ForCausalLM")),
    ),
    Reader("vllm-ascend", "modelslim", "vllm_ascend_reads.py", (VLLM_ASCEND,), architectures=_BUILT),
    Reader(
        "vllm-ascend",
        "compressed-tensors",
        "vllm_ascend_reads.py",
        (VLLM_ASCEND,),
        # Its code finds experts by a class that they have in its own vLLM alone.
        architectures=tuple(name for name in _BUILT if "Moe" not in name and name not in _EXPERTS),
    ),
    Reader(
        "vllm-mindspore",
        "golden-stick",
        "mindformers_reads.py",
        ("mindformers==1.7.0", "vllm-mindspore==0.5.1"),
        "golden-stick",
        (
            "DeepseekV3ForCausalLM",
            "Glm4MoeForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "Qwen3MoeForCausalLM",
            "TeleChat2ForCausalLM",
        ),
        _is_mindformers,
    ),
    Reader(
        "vllm-mindspore",
        "golden-stick",
        "vllm_mindspore_reads.py",
        ("vllm-mindspore==0.5.1",),
        "golden-stick",
        ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        # Llama has no other way, so it is asked for what it refuses, too.
        lambda architecture, scheme: architecture == "LlamaForCausalLM" or _is_native(architecture, scheme),
    ),
)


def make(reader: Reader, base: Path, tokenizer: Any) -> Folders:
    """Tiny models for a reader by architecture, in every scheme that the table has and their recipe."""
    found = {}
    for architecture in reader.architectures:
        model = base / architecture / "float"
        if not model.exists():
            served.make(architecture, model, tokenizer)
        for scheme in served.schemes(model):
            if scheme in table.SCHEMES and reader.takes(architecture, scheme):
                target = base / architecture / reader.format / scheme
                target.parent.mkdir(exist_ok=True)
                if not target.exists():
                    served.quantize(model, target, reader.format, scheme)
                found[architecture, scheme] = target
    return found


def run(reader: Reader, folders: Iterable[Path], work: Path) -> list[dict[str, Any]]:
    """What the script says of each folder. Logs of other people's packages are left in `work`."""
    work.mkdir(exist_ok=True)
    folders = list(folders)
    python = sys.executable if reader.python is None else managed_python(reader.python)
    path = [str(unpacked(package)) for package in reader.packages]
    if reader.python is None:
        path.insert(0, str(REPOSITORY))
    done = subprocess.run(
        [python, str(HERE / reader.script), *map(str, folders)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model"')]
    assert [line["model"] for line in lines] == list(map(str, folders)), done.stderr[-3000:]
    return lines


def read(reader: Reader, folders: Folders, work: Path) -> list[tuple[Reading, dict[str, Any]]]:
    """The readings, each with what it was made of."""
    found = []
    for (architecture, scheme), line in zip(folders, run(reader, folders.values(), work), strict=True):
        lost, unread, mistyped = (len(line.get(key, ())) for key in ("untouched", "unread", "mistyped"))
        counts = (line.get("parameters", 0), line.get("tensors", 0), lost, unread, mistyped)
        error = line.get("error", "").partition(":")[0]
        found.append((Reading(reader.runtime, reader.format, architecture, scheme, Counts(*counts), error), line))
    return found


def _written(reading: Reading) -> str:
    words = (reading.runtime, reading.format, reading.architecture, reading.scheme)
    return " ".join(map(str, (*words, *dataclasses.astuple(reading.counts), reading.error or "-")))


def main(runtimes: list[str]) -> None:
    kept = [each for each in readings.READINGS if runtimes and each.runtime not in runtimes]
    order = list(dict.fromkeys((reader.runtime, reader.format) for reader in READERS))
    tokenizer = train_tokenizer(512)
    with tempfile.TemporaryDirectory() as base:
        for reader in READERS:
            if runtimes and reader.runtime not in runtimes:
                continue
            folders = make(reader, Path(base), tokenizer)
            for reading, line in read(reader, folders, Path(base) / "work"):
                kept.append(reading)
                print(_written(reading), "" if reading.well else json.dumps(line)[:600], file=sys.stderr)
            _write(
                sorted(
                    kept, key=lambda each: (order.index((each.runtime, each.format)), each.architecture, each.scheme)
                )
            )


def _write(found: Iterable[Reading]) -> None:
    file = Path(readings.__file__)
    rows = "".join(f"{_written(each)}\n" for each in found)
    source = file.read_text()
    file.write_text(re.sub(r'(?s)(_ROWS = """\\\n).*?(""")', lambda parts: parts[1] + rows + parts[2], source, count=1))


if __name__ == "__main__":
    main(sys.argv[1:])
