"""The program that msrun runs for every card: python rank.py JOB.json. The first card reports."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any


def _bootstrap() -> Any:
    """qtool.workers, with `import qtool` meaning the package this file is part of."""
    file = Path(__file__).resolve().parents[2] / "workers/program.py"
    spec = importlib.util.spec_from_file_location("_qtool_program", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.adopt()
    return importlib.import_module("qtool.workers")


def main() -> int:
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this folder: its modules have names that others have too
    workers = _bootstrap()
    workers.end_with_parent(os.getppid())  # msrun puts every process into a session of its own
    from qtool.engines.golden_stick import worker
    from qtool.engines.golden_stick.tasks import CalibrateTask
    from qtool.workers.protocol import error_event

    task = CalibrateTask.from_json(json.loads(Path(sys.argv[1]).read_text()))
    first = os.environ.get("RANK_ID", "0") == "0" and os.environ.get("MS_ROLE") != "MS_SCHED"
    events = Path(sys.argv[1]).with_name("events.jsonl") if first else Path(os.devnull)
    report = workers.Report(os.open(events, os.O_WRONLY | os.O_APPEND))
    try:
        report.send(event="result", data=asdict(worker.calibrate(task, "npu", report)))
    except BaseException as error:
        traceback.print_exc()
        report.send(**error_event(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
