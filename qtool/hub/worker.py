"""The worker that talks to a hub, in an interpreter that has the hub's client.

Nothing here is imported by the parent. The token arrives with the job and is kept out of everything that leaves.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.errors import InputError, QtoolError
from qtool.hub.access import Absent, Hub
from qtool.hub.listing import HUBS, Listing
from qtool.hub.names import shown
from qtool.hub.patience import Patience
from qtool.hub.publish import publish
from qtool.hub.transfer import attempt, fetch

if TYPE_CHECKING:
    from qtool.workers import Report


_UNREACHED = {
    "huggingface": "Is there a network? Behind a proxy, set HTTPS_PROXY; for a mirror, set HF_ENDPOINT. "
    "Models on modelers.cn: --from modelers, or modelers:ORG/NAME.",
    "modelers": "Is there a network? Behind a proxy, set HTTPS_PROXY.",
}


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Do one job: `list`, `fetch`, `claim` or `publish`.

    Job keys: task, hub (a key of HUBS), token (or None), and for
    list: repo, revision (or None); result {"listing"} or {"absent": reason, "hint"};
    fetch: listing, folder, workers; result {"sha256": {path: hash}};
    claim: repo, private; an empty result;
    publish: repo, private, files ({path in the repository: local file}), texts ({path: content}), message;
    result {"endpoint", "commit", "skipped": paths that were there already}.
    """
    token: str | None = job["token"]
    try:
        hub = connect(job["hub"], token)
        token = hub.token  # the client may have had one
        _keep_out_of_logs(token)
        return _TASKS[job["task"]](hub, job, report)
    except QtoolError as error:
        raise type(error)(
            redacted(error.what, token),
            where=error.where and redacted(error.where, token),
            hint=error.hint and redacted(error.hint, token),
        ) from None
    except Exception as error:
        if token:  # whatever text there is could have it
            raise QtoolError(redacted(f"{type(error).__name__}: {error}", token), where=HUBS[job["hub"]]) from None
        raise


def connect(name: str, token: str | None) -> Hub:
    """The hub of that name, through its client."""
    if name == "modelers":
        from qtool.hub.modelers import Modelers

        return Modelers(token)
    from qtool.hub.huggingface import HuggingFace

    return HuggingFace(token)


def _list(hub: Hub, job: dict[str, Any], report: Report) -> dict[str, Any]:
    try:
        listing = Patience(base=0.25, say=report.warning, hint=_UNREACHED[hub.name]).persist(  # somebody waits for this
            lambda: attempt(hub, lambda: _listing(hub, job["repo"], job["revision"])), where=hub.endpoint
        )
    except Absent as error:
        return {"absent": error.what, "hint": error.hint}
    return {"listing": listing.to_json()}


def _listing(hub: Hub, repo: str, revision: str | None) -> Listing:
    with hub.requests.of_listing():
        listing = hub.listing(repo, revision)
    for file in listing.files:
        if not isinstance(file.path, str):
            raise InputError(f"refused {shown(file.path)}: its name is not text", where=repo)
    return listing


def _fetch(hub: Hub, job: dict[str, Any], report: Report) -> dict[str, Any]:
    hashes = fetch(
        hub,
        Listing.from_json(job["listing"]),
        Path(job["folder"]),
        lambda stage, done, total: report.progress(stage, done, total, "bytes"),
        workers=job["workers"],
        patience=Patience(say=report.warning),
    )
    return {"sha256": hashes}


def _claim(hub: Hub, job: dict[str, Any], report: Report) -> dict[str, Any]:
    if not hub.token:
        raise hub.unauthorized()
    Patience(base=0.25, say=report.warning, hint=_UNREACHED[hub.name]).persist(
        lambda: attempt(hub, lambda: hub.claim(job["repo"], job["private"])), where=hub.endpoint
    )
    return {}


def _publish(hub: Hub, job: dict[str, Any], report: Report) -> dict[str, Any]:
    files: dict[str, Path | bytes] = {path: Path(file) for path, file in job["files"].items()}
    files |= {path: text.encode() for path, text in job["texts"].items()}
    commit, skipped = publish(
        hub,
        job["repo"],
        files,
        private=job["private"],
        message=job["message"],
        patience=Patience(say=report.warning),
        progress=lambda done, total: report.progress("uploading", done, total, "files"),
    )
    return {"commit": commit, "skipped": skipped, "endpoint": hub.endpoint}


_TASKS = {"list": _list, "fetch": _fetch, "claim": _claim, "publish": _publish}


def redacted(text: str, token: str | None) -> str:
    """`text` without the token, which a server may have sent back to us."""
    return text.replace(token, "<token>") if token else text


def _keep_out_of_logs(token: str | None) -> None:
    make = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args, record.exc_info = redacted(record.getMessage(), token), (), None
        return record

    logging.setLogRecordFactory(factory)
