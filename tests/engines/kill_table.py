"""Kill `qtool quantize` at random moments and resume it: `python -m tests.engines.kill_table [--runs 50] [--seed 0]`.

Every run kills a process, its worker alone or its whole group, by SIGKILL, a few times the one that resumes as well,
and lets the last one end. It prints how many units of work each found finished; every file of the result must be that
of an undisturbed run, byte for byte.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import families
from tests.managed import REPOSITORY

ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SIZE = ("--samples", "8", "--seq-len", "64", "--threads", "1", "--format", "compressed-tensors")
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing struck.

    Attributes:
        files: the digest of each file of the result.
        start: seconds until its journal was there.
        seconds: seconds until its end.
        units: how many it finished before its last.
    """

    files: Mapping[str, str]
    start: float
    seconds: float
    units: int


@dataclass(frozen=True)
class Strike:
    """One SIGKILL.

    Attributes:
        target: "group" or "worker".
        units: how many the journal said were finished; None when it came too early for a journal.
    """

    target: str
    units: int | None


def make_model(folder: Path, layers: int = 6) -> Path:
    """A mixture of experts, FP8 in several shards, of so many layers."""
    tokenizer = families.train_tokenizer(512)
    floats = families.make(folder.with_name(f"{folder.name}-floats"), "glm4_moe", tokenizer, num_hidden_layers=layers)
    return families.to_fp8(floats, folder, shards=2)


def start(model: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qtool", "quantize", model, "-o", output, *SIZE, *options],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def undisturbed(model: Path, folder: Path, *options: str) -> Undisturbed:
    """Run once to the end and look."""
    folder.mkdir()
    begin = time.monotonic()
    process = start(model, folder / "out", *options)
    appeared, units = 0.0, 0
    while process.poll() is None:
        seen = finished_units(folder)
        if seen is not None:
            appeared, units = appeared or time.monotonic() - begin, max(units, seen)
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        sys.exit(f"qtool failed undisturbed:\n{process.communicate()[1]}")
    process.communicate()
    return Undisturbed(digests(folder / "out"), appeared, time.monotonic() - begin, units)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def finished_units(folder: Path) -> int | None:
    """How many units the journal below `folder` says are finished; None when there is no journal."""
    for journal in folder.glob("**/journal.jsonl"):
        try:
            return sum(line.startswith(b'{"entry"') and line.endswith(b"\n") for line in journal.open("rb"))
        except OSError:  # it went meanwhile
            return None
    return None


def strike(
    model: Path, folder: Path, normal: Undisturbed, rng: random.Random, options: Sequence[str] = ()
) -> tuple[list[Strike], str]:
    """Start, kill and resume until it ends; (the kills, "identical" or what is wrong)."""
    folder.mkdir()
    output = folder / "out"
    strikes: list[Strike] = []
    for attempt in range(rng.choice([1, 1, 1, 2, 3])):
        process = start(model, output, *options, *(["--resume"] if attempt else []))
        target = rng.choice(["group", "worker"])
        # Seldom while it still starts: mostly there is nothing to lose then.
        if rng.random() < 0.15:
            _wait(process, rng.uniform(0, normal.start))
        else:
            before = finished_units(folder) or 0
            while process.poll() is None and finished_units(folder) is None:
                time.sleep(_POLL_SECONDS)
            left = max(0.0, 1 - before / max(1, normal.units))
            _wait(process, (normal.start if attempt else 0) + rng.uniform(0, left * (normal.seconds - normal.start)))
        ended = process.poll()
        _kill(process, target)
        process.communicate()
        if ended is not None or output.exists():
            break
        strikes.append(Strike(target, finished_units(folder)))
    if not output.exists():
        process = start(model, output, *options, "--resume")
        _, said = process.communicate()
        if process.returncode:
            return strikes, f"--resume failed with {process.returncode}: {said.strip()}"
    found = digests(output)
    if found != normal.files:
        different = sorted(k for k in {*found, *normal.files} if found.get(k) != normal.files.get(k))
        return strikes, f"DIFFERENT: {', '.join(different)}"
    left_over = sorted(path.name for path in folder.iterdir() if path != output)
    return strikes, f"left over: {', '.join(left_over)}" if left_over else "identical"


def _wait(process: subprocess.Popen[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _kill(process: subprocess.Popen[Any], target: str) -> None:
    """SIGKILL to everything of the process, or to its worker alone, which it then has to notice."""
    if target == "worker":
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        except OSError:
            return
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        if children:
            return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    more = ["--workers", str(options.workers)] if options.workers else []
    outcomes: collections.Counter[str] = collections.Counter()
    units: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", options.layers)
        normal = undisturbed(model, folder / "undisturbed", *more)
        print(f"undisturbed: {normal.seconds:.1f} s, {normal.start:.1f} s of it to the journal; {normal.units} units")
        for number in range(options.runs):
            strikes, outcome = strike(model, folder / str(number), normal, rng, more)
            outcomes[outcome] += 1
            shown = []
            for one in strikes:
                kind = "no journal yet" if one.units is None else "0 units" if not one.units else "more than 0 units"
                units[f"{one.target}, {kind}"] += 1
                shown.append(f"{one.target} at {'-' if one.units is None else one.units}")
            print(f"{number + 1:4d}  {', '.join(shown) or 'ended before the kill':40}  {outcome}", flush=True)
    print("\nkills by target and what was finished:")
    for kind, count in sorted(units.items()):
        print(f"  {kind:30} {count}")
    print("results:")
    for outcome, count in outcomes.most_common():
        print(f"  {outcome:30} {count}")
    sys.exit(outcomes.keys() != {"identical"})


if __name__ == "__main__":
    main()
