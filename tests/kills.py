"""Kill commands at random moments and do them again: `python -m tests.kills [--kills 200] [--only KIND] [--seed 0]`.

Every kill is a SIGKILL, of the whole process or of its worker alone. After a few of them the command is let end; what
it made must be what an undisturbed run makes, byte for byte, with nothing left beside it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import families
from tests.cli.test_run import command as run_command
from tests.cli.test_run import contents, write_recipe
from tests.hub.fixtures import huggingface_server, model_files
from tests.hub.loopback import FOREVER, Fault, Repo
from tests.launcher import Launcher
from tests.managed import REPOSITORY

SIZE = ("--samples", "4", "--seq-len", "32", "--format", "compressed-tensors")
MOST = 4  # kills of one output


@dataclass(frozen=True)
class Job:
    """What is killed.

    Attributes:
        arguments: of qtool, run in a folder of its own.
        again: further ones, from the second time on.
        prepare: puts into that folder what it needs.
        made: what it made there, by name.
        env: variables.
    """

    arguments: Sequence[object]
    made: Callable[[Path], Mapping[str, str]]
    again: Sequence[str] = ()
    prepare: Callable[[Path], object] = lambda _: None
    env: Mapping[str, str] | None = None


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


def of_output(folder: Path) -> dict[str, str]:
    """Everything below `out`; and what lies beside it."""
    beside = {path.name: "beside" for path in folder.iterdir() if path.name != "out"}
    out = folder / "out"
    return beside | (digests(out) if out.is_dir() else {"out": hashlib.sha256(out.read_bytes()).hexdigest()})


def make_jobs(folder: Path, hub: Mapping[str, str]) -> dict[str, Job]:
    tokenizer = families.train_tokenizer(512)
    dense = families.make(folder / "dense", "mixtral", tokenizer, num_hidden_layers=1)
    plain = families.make(folder / "plain", "llama", tokenizer, num_hidden_layers=1)
    experts = families.make(folder / "experts", "glm4_moe", tokenizer, num_hidden_layers=2)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"Number {i} is\n" for i in range(24)))
    generated = (
        "generate",
        dense,
        "--prompt",
        f"@{prompts}",
        "-o",
        "out",
        "--runtime",
        "transformers",
        "--max-tokens",
        "4",
    )

    def recipe(place: Path) -> None:
        write_recipe(place, also="[bfloat16]")

    return {
        "quantize": Job(("quantize", dense, "-o", "out", *SIZE), of_output, ["--resume"]),
        "experts": Job(("quantize", experts, "-o", "out", *SIZE, "--scheme", "w8a8-dynamic"), of_output, ["--resume"]),
        "generate": Job(generated, of_output, ["--resume"]),
        "run": Job(run_command("mine.yaml", plain, "--work", "out"), of_output, prepare=recipe),
        "download": Job(("download", "org/model", "--from", "huggingface", "--to", "out"), of_output, env=hub),
    }


class Killer:
    def __init__(self, folder: Path, launcher: Launcher, env: Mapping[str, str], rng: random.Random) -> None:
        self._folder, self._launcher, self._env, self._rng = folder, launcher, env, rng
        self.number = 0

    def start(self, job: Job, place: Path, again: bool) -> subprocess.Popen[str]:
        arguments = [*job.arguments, *(job.again if again else ())]
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        return self._launcher.start(
            arguments,
            env={**self._env, **(job.env or {})},
            cwd=place,
            stdin=nothing,
            stdout=nothing,
            stderr=pipe,
            text=True,
        )

    def room(self, job: Job) -> Path:
        self.number += 1
        place = self._folder / str(self.number)
        place.mkdir()
        job.prepare(place)
        return place

    def undisturbed(self, job: Job) -> tuple[Mapping[str, str], float]:
        place, began = self.room(job), time.monotonic()
        with self.start(job, place, False) as process:
            said = process.communicate()[1]
        if process.returncode:
            sys.exit(f"qtool failed undisturbed:\n{said}")
        return job.made(place), time.monotonic() - began

    def strike(self, job: Job, normal: Mapping[str, str], seconds: float) -> tuple[int, str]:
        """Kill and do again, until it ends; how many kills there were, and how it came out."""
        place, kills, said = self.room(job), 0, ""
        for attempt in range(self._rng.randint(1, MOST)):
            process = self.start(job, place, attempt > 0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=self._rng.uniform(0, seconds))
            if process.poll() is not None:
                break
            alone = self._rng.random() < 0.3 and _kill_workers(process.pid)
            if not alone:
                process.kill()
            process.communicate()
            kills += 1
        if process.returncode:  # else it came to its end before it could be killed
            with self.start(job, place, True) as process:
                said = process.communicate()[1]
        if process.returncode:
            return kills, f"exit code {process.returncode}: {' '.join(said.split())[:300]}"
        found = job.made(place)
        shutil.rmtree(place)
        different = sorted(name for name in {*found, *normal} if found.get(name) != normal.get(name))
        return kills, f"DIFFERENT: {', '.join(different[:5])}" if different else "identical"


def _kill_workers(pid: int) -> bool:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return False
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)
    return bool(children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, shared among the kinds")
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this time in any case")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, end = random.Random(options.seed), time.monotonic() + options.minutes * 60
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    wrong = 0
    with tempfile.TemporaryDirectory() as name, huggingface_server() as (server, hub):
        env |= {f"XDG_{kind}_HOME": f"{name}/{kind.lower()}" for kind in ("STATE", "CACHE", "CONFIG", "DATA")}
        server.repos["org/model"] = Repo(model_files())
        server.faults["org/model/model-00001-of-00002.safetensors"] = [Fault("slow", times=FOREVER)]
        launcher = Launcher(env)
        jobs = make_jobs(Path(name), hub | {"HF_HOME": f"{name}/hf"})
        chosen = [kind for kind in jobs if not options.only or kind in options.only]
        (Path(name) / "killed").mkdir()
        killer = Killer(Path(name) / "killed", launcher, env, rng)
        warm = Job(("inspect", name), lambda _: {})
        with killer.start(warm, Path(name), False) as process:  # what they all are forks of takes its time
            process.communicate()
        normal = {}
        for kind in chosen:
            normal[kind] = killer.undisturbed(jobs[kind])
            print(f"{kind}: {normal[kind][1]:.1f} s undisturbed, {len(normal[kind][0])} files", flush=True)
        kills: collections.Counter[str] = collections.Counter()
        outcomes: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in chosen}
        while sum(kills.values()) < options.kills and time.monotonic() < end:
            kind = min(chosen, key=lambda kind: kills[kind])
            count, outcome = killer.strike(jobs[kind], *normal[kind])
            kills[kind] += count
            outcomes[kind][outcome] += 1
            print(f"{sum(kills.values()):4d} {kind}: {outcome} after {count} kills", flush=True)
            wrong += outcome != "identical"
        launcher.close()
    for kind in chosen:
        print(f"{kind:10} {normal[kind][1]:6.1f} s undisturbed, {kills[kind]:4d} kills: {dict(outcomes[kind])}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
