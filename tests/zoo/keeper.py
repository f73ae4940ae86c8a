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
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.zoo import configs
from tests.zoo.judge import ABSENT, ERROR, Verdict, judge

_towers = ExitStack()


def run(only: re.Pattern[str], limit: float) -> Iterator[Verdict]:
    """A verdict on every type whose "kind:type" has a match, each within so many seconds."""
    import_all()
    for kind, model_type in configs.kinds():
        if not only.search(f"{kind}:{model_type}"):
            continue
        started = time.monotonic()
        if model_type in configs.LEFT_OUT and not (kind == "text" and model_type in configs.TEXT_ALONE):
            yield Verdict(kind, model_type, ABSENT, configs.LEFT_OUT[model_type])
            continue
        if kind == "text" and model_type in configs.TEXT_OF_PICTURES:
            yield Verdict(kind, model_type, ABSENT, "transformers doesn't load its text part alone; whole it is below")
            continue
        verdict = _verdict(kind, model_type, limit)
        verdict.seconds = round(time.monotonic() - started, 1)
        yield verdict


def import_all() -> None:
    """What every type needs; no product is computed, so that no threads are running when it forks."""
    import torch
    import transformers

    import qtool.engines.native.execute
    import qtool.engines.native.prepare
    import qtool.recipe.load  # noqa: F401
    from qtool.model.towers import without_timm

    _towers.enter_context(without_timm())  # for good: transformers itself builds none of these models without
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def in_fork(work: Callable[[Path], bytes], limit: float) -> bytes | None:
    """What some work in a folder of its own gives, in a fork; None when it takes longer, nothing when it dies."""
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _work(work, folder, writing)
    os.close(writing)
    try:
        content = _read(reading, limit)
        if content is None:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    finally:
        os.close(reading)
        shutil.rmtree(folder, ignore_errors=True)
    return content


def _verdict(kind: str, model_type: str, limit: float) -> Verdict:
    def work(folder: Path) -> bytes:
        return json.dumps(judge(kind, model_type, folder).to_json()).encode()

    content = in_fork(work, limit)
    if content is None:
        return Verdict(kind, model_type, ERROR, f"took more than {limit:.0f} s")
    return Verdict(**json.loads(content)) if content else Verdict(kind, model_type, ERROR, "the process died")


def _work(work: Callable[[Path], bytes], folder: Path, writing: int) -> None:
    """In the child, which ends here."""
    warnings.simplefilter("ignore")
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    try:
        os.write(writing, work(folder))
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
