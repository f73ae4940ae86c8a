"""One process that has imported everything, and a fork of it for each type, so that none can harm the others."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.zoo import configs
from tests.zoo.judge import ABSENT, ERROR, Verdict


def run(only: re.Pattern[str], limit: float) -> Iterator[Verdict]:
    """A verdict on every type whose "kind:type" has a match, each within so many seconds."""
    _import()
    for kind, model_type in configs.kinds():
        if not only.search(f"{kind}:{model_type}"):
            continue
        started = time.monotonic()
        if model_type in configs.LEFT_OUT and not (kind == "text" and model_type in configs.TEXT_ALONE):
            yield Verdict(kind, model_type, ABSENT, configs.LEFT_OUT[model_type])
            continue
        verdict = _in_fork(kind, model_type, limit)
        verdict.seconds = round(time.monotonic() - started, 1)
        yield verdict


def _import() -> None:
    """What every type needs; no product is computed, so that no threads are running when it forks."""
    import torch
    import transformers

    import qtool.engines.native.execute
    import qtool.engines.native.prepare
    import qtool.recipe.load  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _in_fork(kind: str, model_type: str, limit: float) -> Verdict:
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _work(kind, model_type, folder, writing)
    os.close(writing)
    try:
        content = _read(reading, limit)
        if content is None:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    finally:
        os.close(reading)
        shutil.rmtree(folder, ignore_errors=True)
    if content is None:
        return Verdict(kind, model_type, ERROR, f"took more than {limit:.0f} s")
    return Verdict(**json.loads(content)) if content else Verdict(kind, model_type, ERROR, "the process died")


def _work(kind: str, model_type: str, folder: Path, writing: int) -> None:
    """In the child, which ends here."""
    import warnings

    from tests.zoo.judge import judge

    warnings.simplefilter("ignore")
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    try:
        os.write(writing, json.dumps(judge(kind, model_type, folder).to_json()).encode())
    finally:
        os._exit(0)


def _read(reading: int, limit: float) -> bytes | None:
    """All that the child writes; None when it takes too long."""
    content, end = b"", time.monotonic() + limit
    while True:
        ready, _, _ = select.select([reading], [], [], max(0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(reading, 1 << 16)
        if not part:
            return content
        content += part
