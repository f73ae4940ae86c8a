"""A page as a real browser has it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """A browser of Chromium's family: QTOOL_TEST_BROWSER, or the one on the PATH; None where there is none."""
    return os.environ.get("QTOOL_TEST_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)


def dom(browser: str, page: Path, profile: Path) -> str:
    """The page's HTML once it has loaded and its scripts have run.

    Args:
        profile: an empty folder for the browser's own files.
    """
    done = subprocess.run(
        [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--allow-file-access-from-files", f"--user-data-dir={profile}", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
