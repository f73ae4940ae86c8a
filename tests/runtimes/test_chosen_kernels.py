"""Which kernels vLLM takes for linears on a CPU, with qtool's plugin, which it finds by the package's entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from qtool.environments import machine
from qtool.runtimes.kernels.weight_only import NAME
from tests.managed import REPOSITORY

pytestmark = pytest.mark.vllm

# One line of JSON for each [whether int8 is needed, VLLM_DISABLED_KERNELS]. vLLM is imported once; each has a fork.
CODE = """
import json, os, sys
from qtool.workers import hide_media_packages
hide_media_packages()
import torch
import vllm.model_executor.kernels.linear as linear
from vllm.scalar_type import scalar_types
from tests.zoo.keeper import in_fork

def weight_only(kind, shape, group):
    config = linear.MPLinearLayerConfig(shape, shape, kind, torch.bfloat16, group, False)
    try:
        return linear.choose_mp_linear_kernel(config).__name__
    except ValueError:
        return None

def work(needed, own):
    os.environ["VLLM_DISABLED_KERNELS"] = own
    from qtool.runtimes import kernels
    from vllm.plugins import load_general_plugins
    kernels.int8.needed = lambda: needed
    load_general_plugins()
    kernels.register()  # twice is once
    int8 = linear.init_int8_linear_kernel(True, False, True, "a test")
    four = weight_only(scalar_types.uint4b8, (128, 64), 64)
    odd = weight_only(scalar_types.uint4b8, (128, 48), 64)
    eight = weight_only(scalar_types.uint8b128, (128, 64), -1)
    return json.dumps([type(int8).__name__, four, odd, eight]).encode()

for case in json.loads(sys.argv[1]):
    print(in_fork(lambda _: work(*case), 120).decode(), flush=True)
"""
INT8, VLLMS_INT8 = "ExactInt8LinearKernel", "CPUInt8ScaledMMLinearKernel"
INT4 = "CPUWNA16LinearKernel"


@dataclass(frozen=True)
class Case:
    """What the processor needs, and which kernels the user has turned off."""

    needed: bool
    own: str
    int8: str
    there: bool = True


CASES = (
    Case(True, "", INT8),
    Case(False, "", VLLMS_INT8),
    Case(True, "Other", INT8),
    Case(True, f"Other,{INT8}", VLLMS_INT8),
    Case(False, NAME, VLLMS_INT8, there=False),
)


def test_vllm_takes_qtools_where_it_has_none() -> None:
    """4 bits, 4 bits for outputs of which it takes no number, and 8 bits beside floats."""
    asked = json.dumps([[case.needed, case.own] for case in CASES])
    done = subprocess.run([sys.executable, "-c", CODE, asked], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    flags = machine.cpu_flags()
    vllms = INT4 if "avx2" not in flags or "avx512f" in flags else None  # its build for AVX2 has no such product
    for case, (int8, *others) in zip(CASES, lines, strict=True):
        assert int8 == case.int8
        ours = NAME if case.there else None
        # Who turns qtool's off has vLLM's, which it would take there by itself.
        assert others == [vllms or (ours or INT4), ours, ours], case
