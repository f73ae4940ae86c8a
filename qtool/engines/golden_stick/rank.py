"""The program that msrun runs for every card: python rank.py JOB.json. The first card reports."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def _bootstrap() -> Any:
    """qtool.workers, with `import qtool` meaning the package this file is part of."""
    file = Path(__file__).resolve().parents[2] / "workers.py"
    spec = importlib.util.spec_from_file_location("_qtool_workers", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._adopt()
    return importlib.import_module("qtool.workers")


def main() -> int:
    sys.path.pop(0)  # this folder: its modules have names that others have too
    workers = _bootstrap()
    workers.end_with_parent(os.getppid())  # msrun puts every process into a session of its own
    from qtool.engines.golden_stick import worker
    from qtool.engines.golden_stick.tasks import CalibrateTask
    from qtool.errors import InputError, QtoolError, in_one_line

    task = CalibrateTask.from_json(json.loads(Path(sys.argv[1]).read_text()))
    first = os.environ.get("RANK_ID", "0") == "0" and os.environ.get("MS_ROLE") != "MS_SCHED"
    events = Path(sys.argv[1]).with_name("events.jsonl") if first else Path(os.devnull)
    report = workers.Report(os.open(events, os.O_WRONLY | os.O_APPEND))
    try:
        report.send(event="result", data=worker.calibrate(task, "npu", report).to_json())
    except BaseException as error:
        traceback.print_exc()
        kind = "InputError" if isinstance(error, InputError) else "QtoolError"
        if isinstance(error, QtoolError):
            report.send(event="error", type=kind, what=error.what, where=error.where, hint=error.hint)
        else:
            what = f"{type(error).__name__}: {in_one_line(error)}"
            report.send(event="error", type=kind, what=what, where=None, hint=None)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
