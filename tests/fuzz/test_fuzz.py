"""Bad inputs by chance: a sample of every kind. `python -m tests.fuzz` tries more.

A failure names the seed; `python -m tests.fuzz --only KIND --seed SEED` repeats it.
"""

from __future__ import annotations

import collections
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.cli.test_convert import write_gguf
from tests.fuzz.kinds import EXAMPLES, KINDS, PEERS, Scene
from tests.launcher import Launcher

SECONDS = float(os.environ.get("QTOOL_FUZZ_SECONDS", "0"))  # per kind; 0: one small sample
SEED = os.environ.get("QTOOL_FUZZ_SEED")
ONLY = os.environ.get("QTOOL_FUZZ_ONLY", "").split()
_SHOWN = 20


@pytest.fixture(scope="session")
def prepared(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_qtool: Callable[..., Any]
) -> tuple[Path, Path]:
    """The tiny model quantized, and as GGUF."""
    folder = tmp_path_factory.mktemp("fuzz-models")
    done = run_qtool("quantize", tiny_llama, "-o", folder / "quantized", "--samples", "1", "--seq-len", "16")
    assert done.code == 0, done.stderr
    write_gguf(tiny_llama, folder / "tiny.gguf")
    return folder / "quantized", folder / "tiny.gguf"


@pytest.fixture
def scene(
    tmp_path: Path,
    launcher: Launcher,
    qtool_environment: dict[str, str],
    tiny_llama: Path,
    prepared: tuple[Path, Path],
    tiny_tokenizer: Any,
) -> Iterator[Scene]:
    folder = tmp_path / "inputs"
    folder.mkdir()
    scene = Scene(folder, launcher, qtool_environment, tiny_llama, *prepared, tiny_tokenizer)
    with scene.cleanup:
        yield scene


CHOSEN = [
    pytest.param(name, marks=[pytest.mark.peers] if name in PEERS else []) for name in KINDS if not ONLY or name in ONLY
]


@pytest.mark.parametrize("name", CHOSEN)
def test_bad_input_by_chance(scene: Scene, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, take = KINDS[name](scene)
    began, tried = time.monotonic(), 0
    failures: dict[str, tuple[int, str]] = {}
    ends: collections.Counter[str] = collections.Counter()
    number = int(SEED) if SEED else random.randrange(1 << 32) if SECONDS else 0  # a sample is always the same

    def one(value: Any) -> None:
        nonlocal tried
        tried += 1
        for problem in take(value):
            ends[problem.partition(":")[0].partition("\n")[0]] += 1
            if len(failures) < _SHOWN:
                failures.setdefault(_alike(problem), (number, f"{problem}\ninput: {str(value)[:1000]!r}"))

    while True:
        chosen = settings(
            max_examples=EXAMPLES[name] * (5 if SECONDS else 1),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        seed(number)(chosen(given(inputs)(one)))()
        if time.monotonic() - began > SECONDS:
            break
        number += 1
    with capsys.disabled():
        if SECONDS:
            took = f"{scene.commands} commands; at most {scene.peak >> 20} MB, {scene.longest:.1f} s of a processor"
            print(f"\n{name}: {tried} inputs, {took}; {len(failures)} kinds of failure {dict(ends) or ''}", flush=True)
    assert not failures, "\n\n".join(f"seed {number}: {problem}" for number, problem in failures.values())


def _alike(problem: str) -> str:
    """What failures of one cause have in common: the last line, without numbers and what is quoted."""
    import re

    first, last = problem.partition("\n")[0], problem.strip().rpartition("\n")[2]
    return re.sub(r"'[^']*'|\"[^\"]*\"|[\d/.-]+\S*", "_", first.partition(":")[0] + last)[:160]
