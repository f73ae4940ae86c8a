"""Throughput of `qtool download` against the bare clients on loopback, and what verifying adds.

    python tests/benchmarks/bench_download.py [--hub huggingface|modelers] [--rounds 7] [--folder /dev/shm]

Three ways take turns, each in a process of its own with the clock around the transfer alone: the client's own
snapshot download, qtool's, and qtool's without hashing. The server is a process with everything in memory; openmind's
traffic goes through TLS and a proxy, both in Python, whoever downloads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

FILES, MEGABYTES, WORKERS = 4, 96, 4
WAYS = ("client", "qtool", "qtool without hashing")


def transfer(way: str, hub_name: str, folder: Path) -> float:
    """Seconds that one download takes; runs in the client's interpreter."""
    if way == "client" and hub_name == "huggingface":
        from huggingface_hub import snapshot_download

        started = time.perf_counter()
        snapshot_download("org/model", local_dir=folder, max_workers=WORKERS)
        return time.perf_counter() - started
    if way == "client":
        import openmind_hub

        started = time.perf_counter()
        openmind_hub.snapshot_download("org/model", cache_dir=str(folder), max_workers=WORKERS)
        return time.perf_counter() - started
    from qtool.hub import sink, transfer
    from qtool.hub.patience import Patience
    from qtool.hub.worker import connect

    if way == "qtool without hashing":
        sink.Hashes.update = lambda *_: None  # type: ignore[method-assign]
        sink.Hashes.right = True  # type: ignore[method-assign,assignment]
    hub = connect(hub_name, None)
    started = time.perf_counter()
    listing = hub.listing("org/model", None)
    listing = replace(listing, files=tuple(file for file in listing.files if file.digest))
    transfer.fetch(hub, listing, folder, lambda *_: None, workers=WORKERS, patience=Patience())
    return time.perf_counter() - started


def serve(hub_name: str) -> None:
    """A hub in this process; prints the variables for its clients and ends with standard input."""
    from tests.hub.fixtures import huggingface_server, modelers_server
    from tests.hub.loopback import Repo

    with tempfile.TemporaryDirectory() as folder:
        context = huggingface_server() if hub_name == "huggingface" else modelers_server(Path(folder))
        with context as (server, env):
            files = {f"model-{i}.safetensors": os.urandom(MEGABYTES << 20) for i in range(FILES)}
            server.repos["org/model"] = Repo(files)
            print(json.dumps(env), flush=True)
            sys.stdin.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", choices=["huggingface", "modelers"], action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--role", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "serve":
        return serve(options.hub[0])
    if options.role:
        return print(transfer(options.role, options.hub[0], options.folder))
    for hub_name in options.hub or ["huggingface", "modelers"]:
        compare(hub_name, options.rounds, options.folder)
    data = os.urandom(256 << 20)
    started = time.perf_counter()
    hashlib.sha256(data).hexdigest()
    print(f"sha256 alone, one core, in memory: {len(data) / (time.perf_counter() - started) / 1e6:.0f} MB/s")
    return None


def compare(hub_name: str, rounds: int, place: Path) -> None:
    """Print throughput by way: median, and the lowest and highest of all rounds."""
    me = [str(Path(__file__).resolve()), "--hub", hub_name]
    server = subprocess.Popen(
        [sys.executable, *me, "--role", "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        env = {**os.environ, **json.loads(server.stdout.readline()), "PYTHONPATH": str(REPOSITORY)}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OM_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= quiet | {"HUB_WHITE_LIST_PATHS": str(place), "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        python = env.get("QTOOL_OPENMIND_HUB_PYTHON", sys.executable) if hub_name == "modelers" else sys.executable
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for round_ in range(rounds + 1):
            order = WAYS[round_ % len(WAYS) :] + WAYS[: round_ % len(WAYS)]
            for way in order:
                folder = Path(tempfile.mkdtemp(dir=place, prefix="bench-download-"))
                try:
                    command = [python, *me, "--role", way, "--folder", str(folder)]
                    done: Any = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    if round_:  # the first warms up
                        seconds[way].append(float(done.stdout.splitlines()[-1]))
                finally:
                    shutil.rmtree(folder)
                    os.sync()
    finally:
        server.communicate("")
    size = FILES * MEGABYTES * (1 << 20) / 1e6
    print(f"{hub_name}: {FILES} files of {MEGABYTES} MiB, {WORKERS} at a time, {rounds} rounds, to {place}")
    bare = statistics.median(seconds["client"])
    for way, times in seconds.items():
        speeds = sorted(size / t for t in times)
        print(
            f"  {way}: {size / statistics.median(times):.0f} MB/s ({speeds[0]:.0f} to {speeds[-1]:.0f}), "
            f"{bare / statistics.median(times):.2f} of the client's"
        )


if __name__ == "__main__":
    main()
