"""One server over several hosts: what has to run on each, as vLLM-MindSpore's and vllm-ascend's guides do by hand.

A model that needs the cards of several hosts for one copy runs through Ray: a cluster of all hosts, and the server on
the first. Where each host holds whole copies (data parallel), vLLM's own processes do: the server on the first host,
engines without a server on the others, which report to it. Sources: vLLM-MindSpore's documentation of 2026, "Parallel
Inference Methods" and "Multi-machine Parallel Inference (DeepSeek R1)"; vllm-ascend's "Multi-Node (DeepSeek)".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qtool.errors import InputError
from qtool.files import expand
from qtool.runtimes import server
from qtool.runtimes.arguments import SECRETS, is_secret, split
from qtool.runtimes.description import Hardware
from qtool.runtimes.launch import choose, kind_of, recipe_of
from qtool.workers.processes import python

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint

RAY_PORT = 6379
RPC_PORT = 12370  # of the guides' examples
_CARDS = 8
_MOST = 4096  # hosts, and cards of one
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]*")
_LOGIN = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9.:_-]*")
_EXAMPLE = "Each line is like: 192.168.0.10 cards=8 interface=eth0"


@dataclass(frozen=True)
class Node:
    """A host of the file.

    Attributes:
        address: by which the others reach it.
        cards: that it has for the model.
        interface: network interface with that address; None leaves the choice to the libraries.
        login: what ssh is given, USER@HOST or HOST.
    """

    address: str
    cards: int = _CARDS
    interface: str | None = None
    login: str = ""


@dataclass(frozen=True)
class Step:
    """A command on one host.

    Attributes:
        kind: ray, which ends when the host is part of the cluster; engine and serve, which run on.
    """

    node: Node
    kind: Literal["ray", "engine", "serve"]
    command: tuple[str, ...]
    env: Mapping[str, str]


def read(file: str | Path) -> list[Node]:
    """The hosts of a file, the one that serves first.

    A line is ADDRESS [cards=8] [interface=NAME] [login=USER@HOST]; what follows # is a comment.

    Raises:
        InputError: no such file, or a line that makes no sense.
    """
    path = expand(file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "is no text"
        raise InputError(f"can't be read: {what}", where=str(file), hint=_EXAMPLE) from None
    nodes: list[Node] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words:
            nodes.append(_node(words, f"{file}:{number}"))
            if nodes[-1].address in {node.address for node in nodes[:-1]}:
                raise InputError(f"{nodes[-1].address} is there twice", where=f"{file}:{number}", hint=_EXAMPLE)
    if not 2 <= len(nodes) <= _MOST:
        raise InputError(f"names {len(nodes)} hosts, at least 2 are needed", where=str(file), hint=_EXAMPLE)
    return nodes


def plan(
    checkpoint: Checkpoint, runtime: str, arguments: Mapping[str, Any], options: Mapping[str, Any], nodes: list[Node]
) -> list[Step]:
    """Everything that has to run, in order: Ray on each host if it is needed, engines, and at last the server.

    Args:
        arguments: what `--set` says; tensor_parallel_size, data_parallel_size and data_parallel_backend decide here.
        options: of the server itself.

    Raises:
        InputError: the cards don't fit, or the runtime doesn't serve on several hosts.
    """
    from qtool.checkpoint import formats

    chosen = choose(runtime, formats.of(checkpoint).name)
    kind = kind_of(chosen.name)
    if kind == "cpu":
        raise InputError(
            f"{chosen.name} would run on CPUs here, and serves on one host", where="--nodes", hint="Leave it away."
        )
    given, _ = split(arguments)
    if name := next(filter(is_secret, arguments), None):
        what = "would be on command lines, which everybody on those hosts can read"
        raise InputError(what, where=f"--set {name}", hint=f"Set {SECRETS.get(name, name)} on the first host.")
    layout = _layout(checkpoint, given, nodes)
    steps, rank = [], 0
    for i, node in enumerate(nodes):
        env = _variables(kind, chosen.name, node, layout.ray)
        if layout.ray:
            head = ["--head", f"--node-ip-address={node.address}", f"--port={RAY_PORT}"]
            words = (
                head if i == 0 else [f"--address={nodes[0].address}:{RAY_PORT}", f"--node-ip-address={node.address}"]
            )
            start, safe = python(chosen.python, "-m", "ray.scripts.scripts", "start", *words)
            steps.append(Step(node, "ray", tuple(start), {**env, **safe}))
        if i == 0 or not layout.ray:
            own = {**layout.engine(checkpoint, chosen.name, node, nodes[0], rank), **({"headless": True} if i else {})}
            command, more, _ = server.command(checkpoint, runtime, {**own, **arguments}, options, many=True)
            steps.append(Step(node, "engine" if i else "serve", tuple(command), {**env, **more}))
        rank += node.cards // layout.tensor
    return sorted(steps, key=lambda step: ("ray", "engine", "serve").index(step.kind))


@dataclass(frozen=True)
class _Layout:
    """How cards are used: `tensor` for one copy of the model, `data` copies; and whether Ray holds them together."""

    tensor: int
    data: int
    ray: bool

    def engine(self, checkpoint: Checkpoint, runtime: str, node: Node, head: Node, rank: int) -> dict[str, Any]:
        """EngineArgs of one host."""
        found: dict[str, Any] = {"tensor_parallel_size": self.tensor}
        if self.data == 1:
            return found | {"distributed_executor_backend": "ray"}
        found |= {"data_parallel_size": self.data, "data_parallel_size_local": max(1, node.cards // self.tensor)}
        if self.ray:
            found |= {"data_parallel_backend": "ray"}
        else:
            found |= {
                "data_parallel_start_rank": rank,
                "data_parallel_address": head.address,
                "data_parallel_rpc_port": RPC_PORT,
                "distributed_executor_backend": "mp",
            }
        if _experts(checkpoint):
            found["enable_expert_parallel"] = True
            if runtime == "vllm-mindspore":  # else experts are spread over all cards
                found["additional_config"] = {"expert_parallel": self.tensor}
        return found


def _layout(checkpoint: Checkpoint, given: Mapping[str, Any], nodes: list[Node]) -> _Layout:
    total, fewest = sum(node.cards for node in nodes), min(node.cards for node in nodes)
    recipe = recipe_of(checkpoint).tensor_parallel_size
    data = _count(given, "data_parallel_size")
    tensor = _count(given, "tensor_parallel_size") or (total // data if data else recipe if recipe > 1 else fewest)
    data = data or total // max(1, tensor)
    if tensor * data != total:
        raise InputError(
            f"{tensor} cards for each of {data} copies of the model are {tensor * data}, the hosts have {total}",
            where="--nodes",
            hint="Name other hosts, or --set tensor_parallel_size=N --set data_parallel_size=N.",
        )
    whole = all(node.cards % tensor == 0 for node in nodes)
    backend = given.get("data_parallel_backend", "mp" if whole else "ray")
    if data > 1 and backend == "mp" and not whole:
        what = f"{tensor} cards of a copy don't lie in one host, which data_parallel_backend=mp needs"
        raise InputError(what, where="--set", hint="Take data_parallel_backend=ray.")
    return _Layout(tensor, data, ray=data == 1 or backend == "ray")


def _count(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < (1 if name in given else 0):
        raise InputError(f"{name} is {value!r}, expected a number of cards", where="--set")
    return value


def _experts(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    return any(config.get(key) for key in ("n_routed_experts", "num_experts", "num_local_experts"))


def _variables(kind: Hardware, runtime: str, node: Node, ray: bool) -> dict[str, str]:
    """What the guides set on each host."""
    cards = ",".join(map(str, range(node.cards)))
    found = {"VLLM_HOST_IP": node.address}
    names = ["GLOO_SOCKET_IFNAME"]
    if kind == "ascend":
        names += ["HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"]
        found |= {"ASCEND_RT_VISIBLE_DEVICES": cards, "HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_IF_IP": node.address}
    else:
        names += ["NCCL_SOCKET_IFNAME"]
        found |= {"CUDA_VISIBLE_DEVICES": cards}
    if runtime == "vllm-mindspore":
        found |= {"MS_ENABLE_LCCL": "off", "MS_ALLOC_CONF": "enable_vmm:true"}
        found |= {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"} if ray else {}
    elif kind == "ascend" and ray:
        found |= {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1"}
    return found | (dict.fromkeys(names, node.interface) if node.interface else {})


def _node(words: list[str], where: str) -> Node:
    address, values = words[0], {}
    if not _NAME.fullmatch(address):
        raise InputError(f"{address[:100]!r} is no address of a host", where=where, hint=_EXAMPLE)
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key not in ("cards", "interface", "login") or not equals or not value or key in values:
            raise InputError(f"{word[:100]!r} is not understood", where=where, hint=_EXAMPLE)
        values[key] = value
    cards = values.get("cards", str(_CARDS))
    if not re.fullmatch(r"[1-9][0-9]{0,3}", cards) or int(cards) > _MOST:
        raise InputError(f"cards={cards[:100]} is no number of cards", where=where, hint=_EXAMPLE)
    interface, login = values.get("interface"), values.get("login", address)
    if interface is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._,@:-]*", interface):
        raise InputError(f"interface={interface[:100]} is no name of one", where=where, hint=_EXAMPLE)
    if not _LOGIN.fullmatch(login):
        raise InputError(f"login={login[:100]} is not USER@HOST", where=where, hint=_EXAMPLE)
    return Node(address, int(cards), interface, login)
