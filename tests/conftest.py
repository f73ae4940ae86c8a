"""Fixtures every test may use: a tiny but realistic model, and the real command line in a process of its own."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import outputs
from tests.launcher import Launcher
from tests.managed import managed_python

REPOSITORY = Path(__file__).resolve().parent.parent

pytest_plugins = ["tests.hub.fixtures"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background; processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_options_left() -> Iterator[None]:
    """A command that a test ran in this process leaves its --json and the like to the next."""
    from qtool.cli.options import Common, common

    vars(common).update(vars(Common()))
    yield
    vars(common).update(vars(Common()))


# Fixtures that install other projects' packages.
_PEERS = {"golden_stick", "openmind_python", "modelers", "plugin", "quantization"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs packages that `make env` doesn't install."""
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if _PEERS.intersection(item.fixturenames) or parameters.get("hub") == "modelers":
            item.add_marker("peers")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """MindSpore's threads spin for each other; on one core it has one. With both of two that are busy otherwise a test
    takes three times as long."""
    cores = sorted(os.sched_getaffinity(0))
    if "golden_stick" in getattr(item, "fixturenames", ()):
        number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        return (yield)
    finally:
        os.sched_setaffinity(0, cores)


@dataclass(frozen=True)
class Finished:
    """What a `qtool` process left behind."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def qtool_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of `run_qtool`: no network, no colours, and logs and caches in a folder of the tests' own."""
    home = tmp_path_factory.mktemp("home")
    folders = {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("STATE", "CACHE", "CONFIG", "DATA")}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        **folders,
        "PYTHONPATH": path,
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "TERM": "dumb",
    }


@pytest.fixture(scope="session")
def launcher(qtool_environment: dict[str, str]) -> Iterator[Launcher]:
    """Starts `qtool` with everything heavy loaded."""
    launcher = Launcher(qtool_environment)
    yield launcher
    launcher.close()


@pytest.fixture(autouse=True)
def _with_vllm(request: pytest.FixtureRequest) -> None:
    """What a test of vLLM starts may need it."""
    if "launcher" in request.fixturenames:
        launcher: Launcher = request.getfixturevalue("launcher")
        launcher.vllm = request.node.get_closest_marker("vllm") is not None


@pytest.fixture(scope="session")
def run_qtool(qtool_environment: dict[str, str], launcher: Launcher) -> Callable[..., Finished]:
    """run_qtool(*args, stdin="", env={}, cwd=None, timeout=300) -> Finished: `qtool ARGS`, its output piped.

    What it prints with --json is held against its schema.
    """

    def run(
        *args: str | Path,
        stdin: str = "",
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 300,
    ) -> Finished:
        environment = {**qtool_environment, **(env or {})}
        done = launcher.run(
            args, input=stdin, env=environment, cwd=cwd, timeout=timeout, capture_output=True, encoding="utf-8"
        )
        outputs.check(args, done.stdout)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def moments() -> random.Random:
    """What chooses when a process is killed. A test that fails shows the seed; QTOOL_TEST_SEED repeats it."""
    seed = int(os.environ.get("QTOOL_TEST_SEED") or random.randrange(1 << 32))
    print(f"QTOOL_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """`families.train_tokenizer` with 512 entries."""
    from tests.families import train_tokenizer

    return train_tokenizer(512)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """make_model(model_type="llama", **config) -> the folder of a random bfloat16 model with its tokenizer.

    2 layers, hidden 64, 4 query heads on 2 key/value heads of 32 (the smallest size vLLM's CPU attention takes),
    untied embeddings. A few channels are loud, as in real models: in both norms, in the residual stream and in
    down_proj's input, so that smoothing and static ranges have something to do. Biases, where there are any, are not 0.
    """

    def make(model_type: str = "llama", *, seed: int = 0, name: str | None = None, **overrides: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        settings: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": len(tiny_tokenizer),
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "initializer_range": 0.06,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        config = AutoConfig.for_model(model_type, **(settings | overrides))
        config.dtype = torch.bfloat16
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                hidden = config.hidden_size
                loud = torch.randperm(hidden)[: max(2, hidden // 20)]
                model.get_input_embeddings().weight[:, loud] *= 6.0
                for parameter_name, parameter in model.named_parameters():
                    if parameter_name.endswith("layernorm.weight"):
                        parameter.copy_(torch.rand(parameter.shape) * 0.8 + 0.6)
                        parameter[loud[loud < len(parameter)]] *= 5.0
                    elif parameter_name.endswith(".bias"):
                        parameter.copy_(torch.randn(parameter.shape) * 0.1)
                    elif parameter_name.endswith(("up_proj.weight", "v_proj.weight")):
                        parameter[torch.randperm(parameter.shape[0])[:3]] *= 8.0
                    elif parameter_name == "lm_head.weight":
                        parameter *= 4.0  # decisive enough for greedy decoding to mean something
        folder = tmp_path_factory.mktemp("models") / (name or model_type)
        model.to(torch.bfloat16).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_model: Callable[..., Path]) -> Path:
    """The folder of a tiny random Llama (see `make_model`). Shared by all tests: never write into it."""
    return make_model("llama", name="tiny-llama")


@pytest.fixture(scope="session")
def golden_stick() -> dict[str, str]:
    """The environment variable that names an interpreter with mindspore-gs."""
    return {"QTOOL_GOLDEN_STICK_PYTHON": managed_python("golden-stick")}
