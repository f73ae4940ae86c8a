"""qtool serve: hands over to vLLM's OpenAI server."""

from __future__ import annotations

import ipaddress
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from qtool.cli.bundle import expanded
from qtool.cli.generation import Server, Set
from qtool.cli.options import Shown, TrustRemoteCode, console, path_or_stdin
from qtool.errors import QtoolError

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint


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
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, or - to read its path from standard input.")
    ],
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
    trust_remote_code: TrustRemoteCode = False,
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
    from qtool.runtimes import server
    from qtool.runtimes.arguments import parse

    checkpoint = Checkpoint.open(path_or_stdin(model))
    name = listening.served_model_name or checkpoint.path.resolve().name
    own = asdict(listening) | {"served_model_name": name, "trust_remote_code": trust_remote_code or None}
    if nodes is not None:
        _serve_on(nodes, checkpoint, runtime, parse(set_ or ()), own, dry_run=dry_run)
        return
    command, env = server.command(checkpoint, runtime, parse(set_ or ()), own)
    with console() as out:
        if dry_run:
            told = {**env, server.KEY_VARIABLE: "…"} if server.KEY_VARIABLE in env else env
            out.result(shlex.join(["env", *(f"{key}={value}" for key, value in told.items()), *command]))
            return
        address, key = f"{listening.host}:{listening.port}", server.KEY_VARIABLE
        if not _is_loopback(listening.host) and not (env.get(key) or os.environ.get(key)):
            out.warning(f"anyone who can reach {address} can use the model; to require a key, set {key}")
        out.info(f"serving {name} at http://{address}/v1")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, {**os.environ, **env})
    except OSError as error:
        raise QtoolError(f"cannot start the server: {error.strerror}", where=command[0]) from None


def _serve_on(
    file: str, checkpoint: Checkpoint, runtime: str, arguments: dict[str, Any], own: dict[str, Any], *, dry_run: bool
) -> None:
    """On the hosts of a file: print what runs on each, or run it."""
    from qtool.runtimes import nodes, remote

    steps = nodes.plan(checkpoint, runtime, arguments, own, nodes.read(file))
    with console() as out:
        if dry_run:
            told = [{"host": s.node.address, "runs": s.kind, "command": remote.shown(s)} for s in steps]
            lines = [f"# {each['host']}: {each['runs']}\n{each['command']}" for each in told]
            out.result(told if out.json else "\n".join(lines))
            return
        code = remote.run(steps, out.info)
    raise typer.Exit(code)


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name is taken for one that others can, but for localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
