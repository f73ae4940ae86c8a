"""An evaluation's figures in the quantized model's own qtool.json, where its model card finds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint.reader import LOCK, REPORT
from qtool.errors import QtoolError
from qtool.files import read_json, write_json

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
        write_json(file, report)
    except QtoolError as error:
        return f"it {error.what}"
    return None
