"""Who takes a job when nobody says: llama.cpp for one prompt on a CPU, where it is installed and holds the model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool import runtimes
from qtool.checkpoint.reader import Checkpoint
from qtool.environments import lookup, machine
from qtool.runtimes import llama_cpp
from qtool.runtimes.preference import Preferred

Prefer = Callable[..., Preferred]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """A machine without a GPU that has these packages, and llama.cpp's environment."""
    packages = {"vllm", "transformers"}
    monkeypatch.setenv("QTOOL_ENVIRONMENTS", str(tmp_path / "none"))
    monkeypatch.setenv("QTOOL_LLAMA_CPP_PYTHON", sys.executable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lookup, "available", lambda package: package in packages)
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    return packages


def prefer(model: Path, prompting: runtimes.Prompting, runtime: str = "auto") -> Preferred:
    """With llama.cpp's file made already."""
    checkpoint = Checkpoint.open(model)
    file = llama_cpp.file_of(checkpoint)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return runtimes.prefer(runtime, checkpoint, prompting, lambda event: None)


@pytest.mark.parametrize(
    ("prompting", "name", "why"),
    [
        (runtimes.Prompting(1), "llama-cpp", "llama.cpp answers: at one prompt"),
        (runtimes.Prompting(8), "vllm", "vLLM answers: at 8 prompts"),
        (runtimes.Prompting(None), "vllm", "vLLM answers: there may be many prompts"),
        (runtimes.Prompting(1, {"n": 2}), "vllm", "vLLM answers: llama.cpp can't do n"),
        (runtimes.Prompting(1, {"temperature": 0.0}), "llama-cpp", "llama.cpp answers"),
        (runtimes.Prompting(1, {}, {"dtype": "bfloat16"}), "vllm", "llama.cpp can't do --set"),
        (runtimes.Prompting(1, {}, {}, "deepseek_r1"), "vllm", "reasoning parser deepseek_r1"),
    ],
)
def test_the_job_decides(
    prompting: runtimes.Prompting, name: str, why: str, installed: set[str], tiny_int8: Path
) -> None:
    found = prefer(tiny_int8, prompting)
    assert found.launch.name == name
    assert found.why is not None
    assert why in found.why


def test_without_vllm_it_takes_several_prompts_too(installed: set[str], tiny_int8: Path) -> None:
    installed -= {"vllm"}
    found = prefer(tiny_int8, runtimes.Prompting(8))
    assert (found.launch.name, found.why) == ("llama-cpp", "llama.cpp answers: vLLM is not installed")


def test_a_name_settles_it(installed: set[str], tiny_int8: Path) -> None:
    model = tiny_int8
    for name in ("vllm", "transformers", "llama-cpp"):
        found = prefer(model, runtimes.Prompting(1), name)
        assert (found.launch.name, found.why) == (name, None)


def test_nothing_to_choose_without_llama_cpp_or_on_a_gpu(
    installed: set[str], tiny_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_int8
    with monkeypatch.context() as patch:
        patch.delenv("QTOOL_LLAMA_CPP_PYTHON")
        found = prefer(model, runtimes.Prompting(1))
        assert (found.launch.name, found.why) == ("vllm", None)
    monkeypatch.setattr(machine, "has_cuda", lambda: True)
    found = prefer(model, runtimes.Prompting(1))
    assert (found.launch.name, found.why) == ("vllm", None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--scheme", "fp8-dynamic"), "llama.cpp has no type for FP8 dynamic"),
        (("--scheme", "w8a8-dynamic", "--kv-cache", "fp8"), "llama.cpp doesn't keep keys and values as fp8"),
    ],
)
def test_what_its_file_does_not_hold_stays_with_vllm(
    installed: set[str],
    tiny_llama: Path,
    run_qtool: Callable[..., object],
    tmp_path: Path,
    options: tuple[str, ...],
    why: str,
) -> None:
    output = tmp_path / "output"
    run_qtool("quantize", tiny_llama, "--output", output, *options, "--samples", "1", "--seq-len", "16")
    found = prefer(output, runtimes.Prompting(1))
    assert (found.launch.name, found.why) == ("vllm", f"vLLM answers: {why}")
