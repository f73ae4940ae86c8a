"""`qtool config`: the defaults that the user has set, and where."""

from __future__ import annotations

from json import dumps
from typing import Any

from qtool.cli.options import Debug, Json, Quiet, console
from qtool.errors import InputError


def config(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show the defaults that you have set for options, and where: in the configuration file or in a variable.

    The file is config.toml in ~/.config/qtool, or the file that QTOOL_CONFIG names. It has a table for each command:
    under the line [quantize], the line `samples = 64` is the default for the option --samples of `qtool quantize`. The
    variable QTOOL_QUANTIZE_SAMPLES is one too. The command line wins over a variable, and a variable over the file.
    This command checks the whole file.

    Examples:

      qtool config

      qtool schema configuration > config.schema.json
    """
    from qtool import configuration

    file = configuration.config_file()
    values = _values()
    out = console()
    if json:
        out.result({"file": str(file), "exists": file.exists(), "values": values})
        return
    out.info(f"configuration file: {file}{'' if file.exists() else ' (there is none)'}")
    if values:
        rows = [[each["command"], each["option"], _shown(each["value"]), each["source"]] for each in values]
        out.table("", ["command", "option", "value", "set by"], rows, result=True)
    else:
        out.info("No defaults are set.")


def configuration() -> dict[str, Any]:
    """For `qtool doctor`: the file, whether it exists, and what is wrong with it, if anything is."""
    from qtool import configuration as service

    try:
        _values()
        problem = None
    except InputError as error:
        problem = str(error)
    file = service.config_file()
    return {"file": str(file), "exists": file.exists(), "problem": problem}


def _shown(value: Any) -> str:
    """As the file has it."""
    return dumps(value, ensure_ascii=False) if isinstance(value, bool | list) else str(value)


def _values() -> list[dict[str, Any]]:
    """All that is set, in the order of the commands. Raises InputError for what is wrong in the file."""
    from qtool import configuration
    from qtool.cli import app, defaults
    from qtool.environments import settings
    from qtool.environments.table import ENGINES

    defaults.check_tables(app.COMMANDS)
    found = []

    def take(command: Any, names: tuple[str, ...], given: dict[str, Any]) -> None:
        if (inner := getattr(command, "commands", None)) is not None:
            for name, each in inner.items():
                take(each, (*names, name), given.get(name, {}))
            return
        spelled = {param.name: name for name, param in defaults.options(command).items()}
        set_ = {spelled[name]: (value, configuration.place(*names, spelled[name])) for name, value in given.items()}
        set_ |= {name: (value, variable) for name, value, variable in defaults.variables(command, *names)}
        for option, (value, source) in set_.items():
            found.append({"command": " ".join(names), "option": option, "value": value, "source": source})

    for name in app.COMMANDS:
        command = app.load(name)
        take(command, (name,), defaults.of(command, name))
    for engine in ENGINES:
        if named := settings.named_interpreter(engine):
            python, source = named
            source = source if source == settings.variable(engine) else configuration.place(settings.TABLE, engine)
            found.append({"command": settings.TABLE, "option": engine, "value": python, "source": source})
    return found
