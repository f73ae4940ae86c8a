"""Worker processes: a heavy engine runs in an interpreter of its own and speaks JSON lines.

The parent calls `run(module, job, ...)`; the worker calls `module.main(job, report)`. Job in on
stdin, and after it as many inputs as the parent cares to feed; progress, warnings, items and the
result come back on a private pipe, so whatever the engine prints goes to a log file and cannot
disturb the protocol. A worker never outlives its parent, and a worker that dies in whatever way
becomes a `QtoolError`, never a hang.

`parent` and `child` are the two sides, `protocol` is what both know, `processes` starts and ends
children of every kind, `commands` runs those that know nothing of qtool, and `logs` keeps the logs.
The package needs the standard library only: any interpreter that has the engine runs `program.py`.
"""

from qtool.workers.child import Inputs, Report, hide_media_packages
from qtool.workers.logs import LOGS_KEPT, new_log
from qtool.workers.parent import run
from qtool.workers.processes import POLL_SECONDS, end_with_parent
from qtool.workers.protocol import READ_AHEAD, Event

__all__ = [
    "LOGS_KEPT",
    "POLL_SECONDS",
    "READ_AHEAD",
    "Event",
    "Inputs",
    "Report",
    "end_with_parent",
    "hide_media_packages",
    "new_log",
    "run",
]
