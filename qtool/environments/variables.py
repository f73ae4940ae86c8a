"""The variables of the environment that qtool reads. `qtool env vars` prints them, and tests hold the list complete."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.environments.settings import variable
from qtool.environments.table import ENGINES


@dataclass(frozen=True)
class Variable:
    """A variable that a person may set.

    Attributes:
        name: of the variable.
        purpose: what it says, as a sentence.
        read_by: qtool, or a library that does the work.
    """

    name: str
    purpose: str
    read_by: str = "qtool"


_INTERPRETERS = tuple(
    Variable(variable(engine.name), f"The Python interpreter that has {engine.name}.") for engine in ENGINES.values()
)

_OTHERS = (
    Variable("QTOOL_CONFIG", "The configuration file. Usually config.toml in ~/.config/qtool."),
    Variable("QTOOL_COMMAND_OPTION", "A default for an option of a command, such as QTOOL_QUANTIZE_SAMPLES."),
    Variable("QTOOL_ENVIRONMENTS", "The folder of the environments that qtool makes."),
    Variable("HF_TOKEN", "The token for Hugging Face, unless --token-file names another one."),
    Variable("OPENMIND_HUB_TOKEN", "The token for modelers.cn, unless --token-file names another one."),
    Variable("HF_HUB_OFFLINE", "1 keeps qtool and Hugging Face's libraries from using the network."),
    Variable("HF_HUB_CACHE", "The folder of Hugging Face's downloaded models."),
    Variable("HUGGINGFACE_HUB_CACHE", "The same, by its older name."),
    Variable("HF_HOME", "The folder of Hugging Face's cache and token. Usually ~/.cache/huggingface."),
    Variable("XDG_CACHE_HOME", "The folder of caches, where HF_HOME is not set. Usually ~/.cache."),
    Variable("OPENMIND_HUB_ENDPOINT", "The address of modelers.cn, for a mirror."),
    Variable("CUDA_VISIBLE_DEVICES", "The GPUs to use. An empty value hides all of them."),
    Variable("ASCEND_HOME_PATH", "The folder of CANN, Ascend's toolkit."),
    Variable("ASCEND_TOOLKIT_HOME", "The folder of CANN, where ASCEND_HOME_PATH is not set."),
    Variable("VLLM_API_KEY", "The key that requests to `qtool serve` must have."),
    Variable("VLLM_DISABLED_KERNELS", "The kernels that vLLM must not use, separated by commas. qtool adds to them."),
    Variable("VLLM_ENABLE_V1_MULTIPROCESSING", "0 runs vLLM's engine in the process that asks it."),
    Variable("VLLM_MS_MODEL_BACKEND", "The models that vLLM-MindSpore uses: native, mindformers or mindone."),
    Variable("GLOG_v", "How much MindSpore logs: 0 is most, 3 is only errors, which is the default here."),
    Variable("LD_PRELOAD", "Libraries to load first. qtool adds an allocator for vLLM on CPUs."),
    Variable("PATH", "The folders of programs. The folder of an engine's interpreter is put before them."),
    Variable("PYTHONPATH", "Folders of Python modules. Workers get them, too."),
    Variable("RANK_ID", "The number of a card's process. MindFormers sets it."),
    Variable("MS_ROLE", "The role of a process among several cards. MindFormers sets it."),
)

_LIBRARIES = (
    Variable("HF_ENDPOINT", "The address of Hugging Face, for a mirror.", "huggingface_hub"),
    Variable("HTTPS_PROXY", "The proxy for connections to hubs.", "httpx, requests"),
    Variable("NO_PROXY", "The hosts that need no proxy.", "httpx, requests"),
    Variable("XDG_CONFIG_HOME", "Where qtool/config.toml lies. Usually ~/.config.", "platformdirs"),
    Variable("XDG_DATA_HOME", "Where the environments lie that qtool makes. Usually ~/.local/share.", "platformdirs"),
    Variable("XDG_STATE_HOME", "Where the logs lie. Usually ~/.local/state.", "platformdirs"),
    Variable("NO_COLOR", "Any value turns colours off.", "rich"),
)

VARIABLES = (*_INTERPRETERS, *_OTHERS, *_LIBRARIES)
"""Besides these, variables of engines and runtimes have defaults of qtool's, which count only where you set none: those
in configs/runtime-*.yaml and configs/golden-stick.yaml, and the heap settings of the native engine."""
