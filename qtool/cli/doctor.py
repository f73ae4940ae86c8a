"""`qtool doctor`: what this machine has, and what works on it."""

from __future__ import annotations

from typing import Any

import typer

from qtool import sizes
from qtool.cli.config import configuration
from qtool.cli.options import Debug, Json, Quiet, console


def doctor(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show what this machine has and which engines and runtimes work here.

    Each one is tried in the interpreter that would run it. This takes some seconds. For one that doesn't work, the
    command shows what to install. The last line says what to do next, if anything. The exit code is 0 if at least one
    engine and one runtime work, otherwise 1.
    """
    from qtool.environments.doctor import examine

    with console() as out:
        report = examine(out.event) | {"configuration": configuration()}
        out.result(report if json else _text(report))
    if not report["works"]:
        raise typer.Exit(1)


def _text(report: dict[str, Any]) -> str:
    machine = report["machine"]
    memory, cuda, ascend = machine["memory"], machine["cuda"], machine["ascend"]
    facts = {
        "qtool": report["qtool"],
        "Python": f"{report['python']['version']} ({report['python']['executable']})",
        "system": machine["system"],
        "cores": str(machine["cpus"]),
        "memory": _of(memory["available_bytes"], memory["total_bytes"]) if memory else "unknown",
        "disk": f"{sizes.show(machine['disk']['free_bytes'])} free for {machine['disk']['folder']}",
        "settings": _settings(report["configuration"]),
        "CUDA": f"driver {cuda['driver']}, {cuda['devices']} GPUs" if cuda else "none",
        "Ascend": f"{ascend['devices']} NPUs, driver {ascend['driver']}, CANN {ascend['cann']}" if ascend else "none",
    }
    lines = [f"{name:8} {value}" for name, value in facts.items()]
    for kind in ("engine", "runtime", "hub"):
        lines += ["", f"{kind}s"]
        lines += [line for row in report["engines"] if row["kind"] == kind for line in _engine(row)]
    to_do = report["to_do"]
    lines += ["", f"To do: {to_do}" if to_do else "Nothing to do: an engine and a runtime work here."]
    return "\n".join(lines)


def _settings(found: dict[str, Any]) -> str:
    if found["problem"]:
        return found["problem"]
    return f"{found['file']}{'' if found['exists'] else ' (there is none)'}"


def _engine(row: dict[str, Any]) -> list[str]:
    lines = [f"  {'yes' if row['works'] else 'no ':3}  {row['name']:15} {row['problem'] or _versions(row)}"]
    if row["missing"]:
        lines.append(f"{'':23}→ {row['missing']}")
    if row["note"] and row["python"]:  # of no interest where it isn't installed
        lines.append(f"{'':23}{row['note']}")
    return lines


def _versions(row: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{versions} ({row['source']})"


def _of(free: int, total: int) -> str:
    return f"{sizes.show(free)} of {sizes.show(total)} free"
