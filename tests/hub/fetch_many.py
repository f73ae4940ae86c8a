"""A program: many downloads at once, each in a process of its own, as qtool's worker does them.

Runs in an interpreter that has a hub's client. Standard input: {"hub", "jobs": [{"repo", "folder"}]}. Each job is
done twice, the second time as a rerun. Standard output: per job two outcomes, "" for verified, else the error.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

from qtool.errors import QtoolError
from qtool.hub import names, selection
from qtool.hub.patience import Patience
from qtool.hub.transfer import attempt, fetch
from qtool.hub.worker import connect

RUNS = 20


def download(hub_name: str, repo: str, folder: str) -> str:
    try:
        hub = connect(hub_name, None)
        patience = Patience(base=0.05)  # nobody has to wait for a machine to come up again here
        listing = patience.persist(lambda: attempt(hub, lambda: hub.listing(repo, None)), where=repo)
        taken, _ = selection.select(listing.files, [], [], repo)
        names.check(taken, repo)
        wanted = replace(listing, files=tuple(taken))
        Path(folder).mkdir(parents=True, exist_ok=True)
        fetch(hub, wanted, Path(folder), lambda stage, done, total: None, workers=RUNS, patience=patience)
    except QtoolError as error:
        return error.what
    return ""


def twice(job: tuple[str, str, str]) -> tuple[str, str]:
    return download(*job), download(*job)


def main() -> None:
    order = json.load(sys.stdin)
    if order["hub"] == "modelers":
        import qtool.hub.modelers
    else:
        import qtool.hub.huggingface  # noqa: F401 - once, before all the forks
    jobs = [(order["hub"], job["repo"], job["folder"]) for job in order["jobs"]]
    with multiprocessing.get_context("fork").Pool(len(jobs), maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(twice, jobs, chunksize=1)))


if __name__ == "__main__":
    main()
