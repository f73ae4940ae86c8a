"""An evaluation's figures in the quantized model's own qtool.json, where its model card finds them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qtool.checkpoint.reader import LOCK, REPORT, read_json
from qtool.checkpoint.storage import sync

_KEPT = (
    *("text", "runtime", "base_perplexity", "quantized_perplexity", "perplexity_ratio"),
    *("kl_divergence", "kl_median", "kl_p99", "kl_max", "top1_agreement", "top5_agreement"),
)


def keep(folder: Path, result: Mapping[str, Any]) -> str | None:
    """Put what `comparison.compare` found under "evaluation"; the file is whole at every moment.

    Returns:
        Why nothing was written, or None.

    Raises:
        InputError: qtool.json is damaged.
    """
    file = folder / REPORT
    if not file.is_file():
        return f"it has no {REPORT}"
    if (folder / LOCK).exists():
        return f"it was downloaded, and {LOCK} holds the hashes of its files"
    report = read_json(file) | {
        "evaluation": {"base": Path(result["base"]).name, **{key: result[key] for key in _KEPT}}
    }
    try:
        descriptor, path = tempfile.mkstemp(prefix=f".{REPORT}-", dir=folder)
    except OSError as error:
        return f"its folder can't be written: {error.strerror}"
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(report, out, indent=2, ensure_ascii=False)
            out.write("\n")
        os.chmod(path, file.stat().st_mode & 0o777)
        sync(Path(path))
        os.replace(path, file)
    except OSError as error:
        return f"its folder can't be written: {error.strerror}"
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
    sync(folder)
    return None
