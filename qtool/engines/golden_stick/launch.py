"""The worker for several cards: starts msrun and passes on what the first card reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.engines.golden_stick.tasks import CalibrateTask
from qtool.errors import QtoolError
from qtool.workers.processes import python
from qtool.workers.protocol import Lines, as_exception, decode

if TYPE_CHECKING:
    from qtool.workers import Report

_POLL_SECONDS = 0.2
_LOG_LINES = 200


def main(message: dict[str, Any], report: Report) -> dict[str, Any]:
    """Do a `CalibrateTask` through MindFormers, on as many cards as it says; answers with `Calibrated`.

    Raises:
        InputError, QtoolError: as the first card's process reports it, or a process that ended without a report.
    """
    task = CalibrateTask.from_json(message)
    assert task.launch is not None
    scratch = Path(task.scratch)
    settings = scratch / "model.yaml"
    settings.write_text(task.launch.yaml, encoding="utf-8")
    (scratch / "job.json").write_text(json.dumps(asdict(replace(task, model=str(settings)))))
    (scratch / "events.jsonl").touch()
    report.progress("start MindSpore", 0, 0)
    # As a module: the script of that name may have been moved with its environment.
    command, safe = python(sys.executable, "-m", "mindspore.parallel.cluster.run", *task.launch.msrun[1:])
    # msrun starts whatever `python` is on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, **safe, "PATH": path}
    with subprocess.Popen(command, cwd=scratch, env=env, stdin=subprocess.DEVNULL) as process:
        try:
            for event in _events(scratch / "events.jsonl", process):
                if event["event"] == "result":
                    return dict(event["data"])
                if event["event"] == "error":
                    raise as_exception(event)
                report.send(**event)
            process.wait()
        finally:
            _keep_logs(scratch)
            process.terminate()
    raise QtoolError(f"msrun ended without a result (exit code {process.returncode})")


def _events(file: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What the first card's process writes, until all processes are gone."""
    lines = Lines()
    with file.open("rb") as stream:
        while True:
            gone = process.poll() is not None
            yield from map(decode, lines.feed(stream.read()))
            if gone:
                return
            time.sleep(_POLL_SECONDS)


def _keep_logs(scratch: Path) -> None:
    """The ends of every process's log go into this worker's own, which outlives the scratch folder."""
    for file in sorted((scratch / "cards").glob("*.log")):
        print(f"==== {file.name}")
        print(*file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:], sep="\n", flush=True)
