"""The whole fault table, through the command line: `python -m tests.hub.fault_table [--runs 20] [--hub NAME]`.

Every run: a download that a fault strikes at a random place, then the same command again. It prints, per fault, how
the first and the second ended; "WRONG" (a folder that is there but not right) must never appear.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hub.fixtures import (
    IMPATIENT,
    Hub,
    contents,
    huggingface_server,
    model_files,
    modelers_server,
    wanted,
)
from tests.hub.loopback import FOREVER, Fault, LoopbackServer, Repo
from tests.managed import REPOSITORY

SHARD = "model-00001-of-00002.safetensors"
FILES = model_files(elements=300_000)

# kind -> the faults of one download, given the random numbers and the file's size
FAULTS: dict[str, Callable[[random.Random, int], list[Fault]]] = {
    "cut": lambda rng, size: [Fault("cut", rng.randrange(size), rng.randint(1, 3))],
    "close": lambda rng, size: [Fault("close", rng.randrange(size), rng.randint(1, 3))],
    "truncate": lambda rng, size: [Fault("truncate", rng.randrange(size), rng.randint(1, 3))],
    "wrong byte": lambda rng, size: [Fault("wrong", rng.randrange(size))],
    "wrong byte always": lambda rng, size: [Fault("wrong", rng.randrange(size), FOREVER)],
    "cut and wrong byte": lambda rng, size: [
        Fault("close", rng.randrange(size)), Fault("wrong", rng.randrange(size))
    ],
    "length too large": lambda rng, size: [Fault("longer", rng.randrange(size), rng.randint(1, 2))],
    "length too small": lambda rng, size: [Fault("shorter", rng.randrange(size), rng.randint(1, 3))],
    "body too long": lambda rng, size: [Fault("more", rng.randrange(100_000))],
    "range ignored": lambda rng, size: [Fault("close", rng.randrange(size)), Fault("whole")],
    "429 then success": lambda rng, size: [Fault("status", status=429, times=rng.randint(1, 3), retry_after="1")],
    "503 then success": lambda rng, size: [Fault("status", status=503, times=rng.randint(1, 3))],
    "500 for ever": lambda rng, size: [Fault("status", status=500, times=FOREVER)],
    "stall": lambda rng, size: [Fault("stall", rng.randrange(size))],
}  # fmt: skip
# kind (with dashes) -> what the error says; the others end well, at the latest the second time
PERMANENT = {"500-for-ever": "500 Internal Server Error", "wrong-byte-always": "the hash differs"}


def command(hub: Hub) -> list[str]:
    return [sys.executable, "-m", "qtool", "download", "org/model", "--from", hub.name, "--quiet"]


def start(hub: Hub, folder: Path, before: str = "") -> subprocess.Popen[str]:
    env = {**os.environ, **hub.env, "PYTHONPATH": str(REPOSITORY)}
    words = ["bash", "-c", f'{before}exec "$@"', "bash", *command(hub)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def outcome(process: subprocess.Popen[str], folder: Path) -> str:
    """How a download ended: verified, killed, the error, or WRONG."""
    out, err = process.communicate(timeout=300)
    there = (folder / "model").exists()
    if there and contents(folder / "model") != wanted(FILES):
        return "WRONG"
    if process.returncode == 0:
        return "verified" if there and out == f"{folder / 'model'}\n" else "WRONG"
    if process.returncode < 0:
        return "killed"
    return err.splitlines()[0] if err.startswith("error: ") else f"WRONG: {err}"


def strike(kind: str) -> Callable[[Hub, Path, random.Random], tuple[str, str]]:
    def run(hub: Hub, folder: Path, rng: random.Random) -> tuple[str, str]:
        hub.server.faults[f"org/model/{SHARD}"] = FAULTS[kind](rng, len(FILES[SHARD]))
        return outcome(start(hub, folder), folder), outcome(start(hub, folder), folder)

    return run


def kill(hub: Hub, folder: Path, rng: random.Random) -> tuple[str, str]:
    hub.server.faults[f"org/model/{SHARD}"] = [Fault("slow", times=FOREVER)]
    process = start(hub, folder)
    time.sleep(rng.uniform(0.2, 1.5))
    process.send_signal(signal.SIGKILL)
    return outcome(process, folder), outcome(start(hub, folder), folder)


def full_disk(hub: Hub, folder: Path, rng: random.Random) -> tuple[str, str]:
    limited = start(hub, folder, before=f"ulimit -f {rng.randint(20, len(FILES[SHARD]) // 1024)}; ")
    return outcome(limited, folder), outcome(start(hub, folder), folder)


def two_at_once(hub: Hub, folder: Path, rng: random.Random) -> tuple[str, str]:
    hub.server.faults[f"org/model/{SHARD}"] = [Fault("slow", times=FOREVER)]
    first = start(hub, folder)
    time.sleep(rng.uniform(0, 1))
    second = start(hub, folder)
    return outcome(first, folder), outcome(second, folder)


def gone_and_back(hub: Hub, folder: Path, rng: random.Random, seconds: float | None = None) -> tuple[str, str]:
    """The server's process ends in the middle, and another takes its port some time later."""
    hub.server.repos["org/model"] = Repo(FILES)
    hub.server.faults[f"org/model/{SHARD}"] = [Fault("close", rng.randrange(len(FILES[SHARD])))]
    server: LoopbackServer = hub.server.behind  # type: ignore[attr-defined]
    process = start(hub, folder)
    while not server.requests and process.poll() is None:
        time.sleep(0.01)
    server.stop()
    time.sleep(rng.uniform(0.2, 4) if seconds is None else seconds)
    again = server.again()
    again.start()
    try:
        return outcome(process, folder), outcome(start(hub, folder), folder)
    finally:
        again.stop()


RUNS: dict[str, Callable[[Hub, Path, random.Random], tuple[str, str]]] = {
    **{kind: strike(kind) for kind in FAULTS},
    "server gone and back": gone_and_back,
    "disk full": full_disk,
    "SIGKILL": kill,
    "two at once": two_at_once,
}


@contextlib.contextmanager
def hub_of_its_own(name: str, folder: Path) -> collections.abc.Iterator[Hub]:
    context = huggingface_server() if name == "huggingface" else modelers_server(folder)
    with context as (server, env):
        server.repos["org/model"] = Repo(FILES)
        env = env | IMPATIENT | {"HF_HOME": str(folder), "XDG_STATE_HOME": str(folder)}
        yield Hub(name, server, env, run=lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--hub", choices=["huggingface", "modelers"], action="append")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--only", action="append", help="one kind of fault; repeat it for more")
    options = parser.parse_args()
    print(
        f"seed {options.seed}, {options.runs} runs each\n\n| hub | fault | first | again |\n| --- | --- | --- | --- |"
    )
    wrong = 0
    for name in options.hub or ["huggingface", "modelers"]:
        for kind in options.only or RUNS:

            def one(i: int, name: str = name, kind: str = kind) -> tuple[str, str]:
                rng = random.Random(f"{options.seed} {name} {kind} {i}")
                with (
                    tempfile.TemporaryDirectory() as own,
                    tempfile.TemporaryDirectory() as work,
                    hub_of_its_own(name, Path(own)) as hub,
                ):
                    return RUNS[kind](hub, Path(work).resolve(), rng)

            with ThreadPoolExecutor(4) as pool:
                ends = list(pool.map(one, range(options.runs)))
            wrong += sum("WRONG" in end for pair in ends for end in pair)
            print(f"| {name} | {kind} | {summary(first for first, _ in ends)} | {summary(last for _, last in ends)} |")
            sys.stdout.flush()
    print(f"\n{wrong} wrong")
    sys.exit(bool(wrong))


def summary(ends: collections.abc.Iterable[str]) -> str:
    return ", ".join(f"{count} {end}" for end, count in collections.Counter(ends).most_common())


if __name__ == "__main__":
    main()
