"""A job on its way to a worker."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qtool import runtimes
from qtool.errors import InputError
from qtool.runtimes.generation import prepare
from qtool.runtimes.job import ChatSettings, Extras, GenerationJob, WorkerJob


def test_what_a_worker_reads_is_what_was_written() -> None:
    job = WorkerJob(
        model="/m",
        sampling={"seed": 3, "stop": ["a"]},
        runtime="vllm",
        arguments={"max_num_seqs": 2},
        chat=ChatSettings(required=True, template_kwargs={"a": [1]}, reasoning_parser="qwen3"),
        extras=Extras(gaps=True),
        expected=5,
        dtype="bfloat16",
        engine={"max_model_len": None},
        compile_from=7,
    )
    assert WorkerJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_what_is_decided_about_a_job(tiny_llama: Path) -> None:
    job = GenerationJob(model=str(tiny_llama), runtime="vllm", arguments={"max_model_len": 9, "OMP_NUM_THREADS": 3})
    launch, decided = prepare(dataclasses.replace(job, one_at_a_time=True))
    assert launch.env["OMP_NUM_THREADS"] == "3"
    assert (decided.runtime, decided.model) == ("vllm", str(tiny_llama.resolve()))
    assert (decided.engine["max_num_seqs"], decided.engine["max_model_len"]) == (1, 9)
    assert decided.arguments == job.arguments
    assert prepare(job)[1].engine["max_num_seqs"] > 1
    given = dataclasses.replace(job, one_at_a_time=True, arguments={"max_num_seqs": 5})
    assert prepare(given)[1].engine["max_num_seqs"] == 5


def test_sampling_that_makes_no_sense(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="max_token"):
        runtimes.generate(tiny_llama, ["x"], max_token=3)
