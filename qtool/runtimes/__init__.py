"""Who generates: vLLM (with its plugins) and transformers, the reference. Each runs as a worker.

What is known of them is in a file each, listed in `facts`: who reads which format, where it runs, what it must be told.
`launch.choose` decides which of them can run a checkpoint, `preference.prefer` which of these suits a job;
`generation.stream` has it answer requests as they come, and
`generate` and `sample` are its short forms. Nothing heavy is imported here: what runs in a runtime's own interpreter is
in `worker`.
"""

from __future__ import annotations

from qtool.runtimes.facts import NAMES, RUNTIMES, get, problems, read_by, readers
from qtool.runtimes.generation import Generated, check, generate, sample, stream
from qtool.runtimes.job import ChatSettings, Extras, GenerationJob
from qtool.runtimes.launch import Launch, adapted, choose, kind_of
from qtool.runtimes.preference import Prompting, prefer

__all__ = [
    "NAMES",
    "RUNTIMES",
    "ChatSettings",
    "Extras",
    "Generated",
    "GenerationJob",
    "Launch",
    "Prompting",
    "adapted",
    "check",
    "choose",
    "generate",
    "get",
    "kind_of",
    "prefer",
    "problems",
    "read_by",
    "readers",
    "sample",
    "stream",
]
