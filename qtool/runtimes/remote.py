"""The commands of `nodes.plan` on their hosts, through ssh where a host isn't this one."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
from collections.abc import Callable, Sequence

from qtool.errors import InputError, QtoolError
from qtool.runtimes.nodes import Node, Step

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_PATIENCE = 15  # seconds that a process has to end by itself


def run(steps: Sequence[Step], say: Callable[[str], None]) -> int:
    """Do the steps in order, and wait for the server to end; what was started ends with it.

    Returns:
        The server's exit code.

    Raises:
        QtoolError: a host can't be reached, or what was started there ends before the server does.
    """
    for node in {step.node.address: step.node for step in steps}.values():
        _check(node)
    running: list[tuple[Step, subprocess.Popen[bytes]]] = []
    ray: list[Step] = []
    try:
        for step in steps:
            say(f"{step.node.address}: {_TOLD[step.kind]}")
            if step.kind == "ray":
                ray.append(step)
                if code := subprocess.run(_words(step), stdin=subprocess.DEVNULL).returncode:
                    raise QtoolError(f"Ray can't be started: exit code {code}", where=step.node.address)
            else:
                # A terminal, so that the remote command ends when this one does.
                running.append((step, subprocess.Popen(_words(step, terminal=True), stdin=subprocess.DEVNULL)))
        return _wait(running)
    finally:
        for _, process in reversed(running):
            _end(process)
        for step in ray:
            say(f"{step.node.address}: stop Ray")
            stop = (*step.command[: step.command.index("start")], "stop")
            subprocess.run(_words(Step(step.node, "ray", stop, {})), stdin=subprocess.DEVNULL, check=False)


_TOLD = {"ray": "start Ray", "engine": "start an engine", "serve": "start the server"}


def _wait(running: Sequence[tuple[Step, subprocess.Popen[bytes]]]) -> int:
    while True:
        for step, process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(0.2)
                if step.kind == "serve":
                    return code
                raise QtoolError(f"an engine has ended: exit code {code}", where=step.node.address)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def is_here(node: Node) -> bool:
    """Whether an address is one of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(node.address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _check(node: Node) -> None:
    if is_here(node):
        return
    try:
        done = subprocess.run(
            [*_SSH, "--", node.login, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except OSError:
        raise InputError("ssh is not installed here", where="--nodes", hint="--dry-run prints the commands.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        hint = "ssh must reach it without a password. --dry-run prints the commands, to be run by hand."
        raise QtoolError(f"can't be reached: {last}", where=node.login, hint=hint)


def _words(step: Step, *, terminal: bool = False) -> list[str]:
    env = [f"{key}={value}" for key, value in step.env.items()]
    if is_here(step.node):
        return ["env", *env, *step.command]
    return [*_SSH, *(("-tt",) if terminal else ()), "--", step.node.login, shlex.join(["env", *env, *step.command])]


def shown(step: Step) -> str:
    """A step as a line that a shell takes."""
    env = [f"{key}={value}" for key, value in step.env.items()]
    return shlex.join(["env", *env, *step.command])
