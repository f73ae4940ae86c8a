"""qtool serve: vLLM's OpenAI server, started, watched and stopped."""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from qtool.cli.bundle import expanded
from qtool.cli.generation import Server, Set
from qtool.cli.options import MODEL, Offline, Shown, TrustRemoteCode, console, find_model

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.console import Console
    from qtool.runtimes.serving import Address


@dataclass(frozen=True)
class Listening:
    """Where the server listens, and what it is called by."""

    panel: ClassVar[str] = "Server"

    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="The address to listen on. 0.0.0.0 means all addresses of this machine."),
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000
    served_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The name of the model in requests.", show_default="the folder's name"),
    ] = None


@expanded
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    listening: Listening,
    *,
    runtime: Server = "auto",
    set_: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command and its environment variables, and stop.")
    ] = False,
    nodes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Serve on several hosts; the file names one in each line.")
    ] = None,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the server's own log.")] = False,
    shown: Shown,
) -> None:
    """Serve a model with vLLM's OpenAI server, with the same settings for this hardware as `qtool generate`.

    Every option of vLLM can be given with --set KEY=VALUE. To protect the server, set the environment variable
    VLLM_API_KEY: requests must then have this key.

    Examples:

      qtool serve ./SmolLM2-W8A8 --port 8000

      qtool serve ./Qwen3-W8A8 --set max_model_len=8192 --set reasoning_parser=qwen3

      qtool serve ./DeepSeek-R1-W8A8 --nodes hosts.txt --set tensor_parallel_size=4 --dry-run
    """
    from qtool.checkpoint.reader import Checkpoint
    from qtool.runtimes import server, serving
    from qtool.runtimes.arguments import SECRETS, is_secret, parse
    from qtool.runtimes.template import has_chat_template

    with console("starting") as out:
        found = find_model(model, out)
        checkpoint = Checkpoint.open(found.path)
        name = listening.served_model_name or found.name
        own = asdict(listening) | {"served_model_name": name, "trust_remote_code": trust_remote_code or None}
        given = parse(set_ or ())
        if secret := next(filter(is_secret, given), None):
            variable = SECRETS.get(secret, secret)
            out.warning(
                f"every user of this machine can read --set {secret}; set the environment variable {variable} instead"
            )
        if nodes is not None:
            _serve_on(nodes, checkpoint, runtime, given, own, out, dry_run=dry_run)
            return
        command, env, otherwise = server.command(checkpoint, runtime, given, own)
        if otherwise is not None:
            out.warning(otherwise)
        if dry_run:
            told = (f"{name}={'…' if is_secret(name) else value}" for name, value in env.items())
            out.result(shlex.join(["env", *told, *command]))
            return
        address = serving.Address(listening.host, listening.port, secure=bool(given.get("ssl_certfile")))
        address.check()
        locked = bool(env.get(server.KEY_VARIABLE) or os.environ.get(server.KEY_VARIABLE))
        if not _is_loopback(listening.host) and not locked:
            reached = f"{listening.host}:{listening.port}"
            key = server.KEY_VARIABLE
            out.warning(f"anyone who can reach {reached} can use the model; to require a key, set {key}")
        _serve(
            command,
            env,
            address,
            lambda: _say_ready(name, address, out, chat=has_chat_template(checkpoint), locked=locked),
            out,
            verbose=verbose,
        )


def _serve(
    command: list[str],
    env: dict[str, str],
    address: Address,
    ready: Callable[[], None],
    out: Console,
    *,
    verbose: bool,
) -> None:
    """Until it ends. Ctrl-C is how a server that is up is ended, so that is no failure."""
    from qtool.runtimes import serving

    up = False

    def on_ready() -> None:
        nonlocal up
        up = True
        ready()

    def on_line(line: str) -> None:
        if verbose:
            out.info(line)

    try:
        serving.run(command, env, address, on_stage=out.status, on_line=on_line, on_ready=on_ready)
    except KeyboardInterrupt as stop:
        if not up or type(stop) is not KeyboardInterrupt:  # or a signal that has an exit code of its own
            raise
        out.info("the server has stopped")


def _say_ready(name: str, address: Address, out: Console, *, chat: bool, locked: bool) -> None:
    out.end_progress()
    body: dict[str, Any]
    if chat:
        path, body = "chat/completions", {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    else:
        path, body = "completions", {"model": name, "prompt": "I am", "max_tokens": 32}
    key = '-H "Authorization: Bearer $VLLM_API_KEY" ' if locked else ""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    out.info(f"ready: {name} answers; Ctrl-C stops the server. Try it:")
    out.info(f"  curl {address.url}/v1/{path} {key}-H 'Content-Type: application/json' -d {data}")
    out.result(f"{address.url}/v1")


def _serve_on(
    file: str,
    checkpoint: Checkpoint,
    runtime: str,
    arguments: dict[str, Any],
    own: dict[str, Any],
    out: Console,
    *,
    dry_run: bool,
) -> None:
    """On the hosts of a file: print what runs on each, or run it."""
    from qtool.runtimes import nodes, remote

    steps = nodes.plan(checkpoint, runtime, arguments, own, nodes.read(file))
    if dry_run:
        told = [{"host": step.node.address, "runs": step.kind, "command": remote.shown(step)} for step in steps]
        lines = [f"# {each['host']}: {each['runs']}\n{each['command']}" for each in told]
        out.result(told if out.json else "\n".join(lines))
        return
    raise typer.Exit(remote.run(steps, out.info))


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name is taken for one that others can, but for localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
