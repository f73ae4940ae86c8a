"""A program: lists the repository org/m on modelers.cn, through its client, each time that a line comes.

Runs in an interpreter that has openmind-hub. For each line it answers with one: "" or what is wrong, as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import traceback

from qtool.errors import QtoolError
from qtool.hub import download, worker
from qtool.hub.listing import Listing
from qtool.hub.patience import Again
from qtool.hub.transfer import attempt


def problem() -> str:
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hub = worker.connect("modelers", "token")
    try:
        found = attempt(hub, lambda: worker._listing(hub, "org/m", None))
        listing = Listing.from_json(json.loads(json.dumps(found.to_json())))
        download.plan(listing, (), ())
        download.plan(listing, ("*",), ("x*",))
    except (QtoolError, Again):
        pass
    except Exception as error:
        return "".join(traceback.format_exception(error))[-1500:]
    if (seconds := time.process_time() - began) > 30:
        return f"took {seconds:.0f} s"
    if (grown := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10) > 1024:
        return f"took {grown} MB"
    return ""


def main() -> None:
    for _ in sys.stdin:
        print(json.dumps(problem()), flush=True)


if __name__ == "__main__":
    main()
