"""Every family that a recipe ships for, in every scheme: read by its runtimes' own loading code, tensor by tensor.

Wanted is that each tensor of the files is looked into, and each parameter of the model filled from them; where that is
not so, qtool says so beforehand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qtool.runtimes import table
from tests.checkpoint import served
from tests.managed import REPOSITORY, unpacked

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folders(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Compressed-tensors checkpoints by architecture and scheme."""
    return made("compressed-tensors", tiny_tokenizer, tmp_path_factory)


def made(format: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    base = tmp_path_factory.mktemp("served")
    found = {}
    for architecture in served.ARCHITECTURES:
        model = served.make(architecture, base / architecture / "float", tokenizer)
        for scheme in served.schemes(model):
            if scheme in table.SCHEMES:
                target = base / architecture / scheme
                served.quantize(model, target, format, scheme)
                found[architecture, scheme] = target
    return found


def read(script: str, folders: dict[tuple[str, str], Path], *packages: Path) -> dict[tuple[str, str], dict[str, Any]]:
    command = [sys.executable, HERE / script, *folders.values()]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, *packages)))}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["model"] for line in lines] == list(map(str, folders.values()))
    return dict(zip(folders, lines, strict=True))


def check(
    runtime: str,
    found: dict[tuple[str, str], dict[str, Any]],
    inaccessible: str = "",
    format: str = "compressed-tensors",
) -> None:
    answers = {
        (model, scheme): row.answer
        for row in table.rows()
        if (row.runtime, row.format) == (runtime, format)
        for model in row.models
        for scheme in row.schemes
    }
    counted = 0
    for (architecture, scheme), result in found.items():
        well = "error" not in result and not result["untouched"] and not result["unread"]
        expected = {"yes": True, "with a setting": True, "no": False}.get(answers[architecture, scheme])
        if expected is None:  # nobody knows: this machine can't build it
            assert architecture == inaccessible
            continue
        assert well == expected, (architecture, scheme, result)
        counted += result.get("parameters", 0) if well else 0
    assert counted > 300  # it did build models


@pytest.mark.vllm
def test_vllm(folders: dict[tuple[str, str], Path]) -> None:
    check("vLLM", read("vllm_reads.py", folders), inaccessible="Glm4vForConditionalGeneration")  # needs torchvision


@pytest.mark.slow
def test_transformers(folders: dict[tuple[str, str], Path]) -> None:
    check("transformers", read("transformers_reads.py", folders), inaccessible="Glm4vForConditionalGeneration")


@pytest.mark.peers
def test_vllm_ascend(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    experts = {family.architecture for family in table.FAMILIES if family.experts}
    folders = {
        (architecture, scheme): folder
        for (architecture, scheme), folder in made("modelslim", tiny_tokenizer, tmp_path_factory).items()
        if architecture != "Glm4vForConditionalGeneration"  # needs torchvision
        # and quantized experts a method that isn't run here
        and (architecture not in experts or scheme == "w8a8-static")
    }
    check("vllm-ascend", read("vllm_ascend_reads.py", folders, unpacked("vllm-ascend==0.18.0")), format="modelslim")
