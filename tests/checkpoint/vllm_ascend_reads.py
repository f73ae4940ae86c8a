"""What vllm-ascend 0.23 takes of checkpoints: python vllm_ascend_reads.py FOLDER..., lines of JSON as of vllm_reads.

All that reads linear layers and quantized experts is the plugin's own, as in vllm_ascend_on_cpu; float experts have
vLLM's method.
"""

from __future__ import annotations

import sys

import vllm_ascend_on_cpu  # type: ignore[import-not-found]  # noqa: F401 (makes the plugin importable here)
import vllm_reads  # type: ignore[import-not-found]

vllm_reads.main(sys.argv[1:], "ascend")
