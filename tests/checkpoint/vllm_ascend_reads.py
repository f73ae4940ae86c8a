"""What vllm-ascend 0.23 takes of checkpoints: python vllm_ascend_reads.py FOLDER..., lines of JSON as of vllm_reads.

Of modelslim, whose description it is told to look for, and of compressed-tensors, of which config.json speaks. All that
reads linear layers and quantized experts is the plugin's own, as in vllm_ascend_on_cpu; float experts have vLLM's
method.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import vllm_ascend_on_cpu  # type: ignore[import-not-found]  # noqa: F401 (makes the plugin importable here)
import vllm_reads  # type: ignore[import-not-found]

# Weights without zero points have these in modelslim's files, and the kernels never look at them.
_USELESS = re.compile(rf"{vllm_reads.OPTIONAL.pattern}|\.weight_offset$")


def main(folders: list[str]) -> None:
    usual = vllm_reads.OPTIONAL
    for folder in folders:
        described = "quantization_config" in json.loads((Path(folder) / "config.json").read_text())
        vllm_reads.OPTIONAL = _USELESS if described else usual
        vllm_reads.main([folder], None if described else "ascend")


main(sys.argv[1:])
