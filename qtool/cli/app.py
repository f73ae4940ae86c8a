"""The root of the command line: which commands there are, and how anything that goes wrong is reported.

A command's module is imported when that command runs; `qtool --help` reads only the table below.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core
import typer.main

from qtool.cli import streams
from qtool.cli.helptexts import Commands
from qtool.cli.options import common
from qtool.console import begin, printed
from qtool.errors import Bug, InputError, Interrupted, QtoolError, UsageProblem, in_one_line, of_system
from qtool.files import NO_SPACE
from qtool.version import __version__

if TYPE_CHECKING:
    from qtool.cli.options import Common

# name: (module:function, or module:Typer for a group of commands; one line for the overview)
COMMANDS = {
    "download": ("qtool.cli.download:download", "Download a model from a hub, and check it."),
    "quantize": ("qtool.cli.quantize:quantize", "Quantize a model, to W8A8 or another precision."),
    "generate": ("qtool.cli.generate:generate", "Generate text with a model, quantized or not."),
    "chat": ("qtool.cli.chat:chat", "Talk with a model, in the terminal."),
    "serve": ("qtool.cli.serve:serve", "Serve a model with vLLM's OpenAI server."),
    "eval": ("qtool.cli.eval:evaluate", "Compare a quantized model with its original."),
    "analyze": ("qtool.cli.analyze:analyze", "Rank a model's linear layers by what quantizing them costs."),
    "tune": ("qtool.cli.tune:tune", "Make a recipe: which layers stay float, which go per token."),
    "runtimes": ("qtool.cli.runtimes:runtimes", "Show which runtime reads what, or can serve a model."),
    "inspect": ("qtool.cli.inspect:inspect", "Show what a checkpoint is: architecture, format, size, schemes."),
    "convert": ("qtool.cli.convert:convert", "Convert between W8A8 formats, or from a GGUF file."),
    "run": ("qtool.cli.run:run", "Do a whole recipe, from download to text, as one job."),
    "upload": ("qtool.cli.upload:upload", "Upload a model to a hub, with a model card."),
    "recipes": ("qtool.cli.recipes:app", "List, show and validate recipes."),
    "schema": ("qtool.cli.schema:schema", "Print the JSON Schema of recipes, of settings, or of outputs."),
    "config": ("qtool.cli.config:config", "Show the defaults that you have set, and where."),
    "env": ("qtool.cli.env:app", "List, install and remove environments for engines and runtimes."),
    "doctor": ("qtool.cli.doctor:doctor", "Show what works on this machine, and what is missing."),
}
_TELLS_OF_SETTINGS = ("config", "doctor")  # what is wrong with them, in words of their own


def load(name: str) -> typer.core.TyperCommand | typer.core.TyperGroup:
    """The real command behind `name`; imports its module."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        function = target
        target = Commands(add_completion=False, rich_markup_mode=None)
        target.command(name)(function)
    command = typer.main.get_command(target)
    command.name = name
    return command  # type: ignore[return-value]


class LazyGroup(typer.core.TyperGroup):
    """Holds placeholders that know their one-line help; the one that is called is replaced by the real command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in COMMANDS:
            name = args[0]
            self.commands[name] = load(name)
            if name not in _TELLS_OF_SETTINGS and not ctx.resilient_parsing:
                from qtool.cli import defaults

                ctx.auto_envvar_prefix = defaults.PREFIX  # from here on: not for options of the root itself
                defaults.check_tables(COMMANDS)
                ctx.default_map = {name: defaults.of(self.commands[name], name)}
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _in_plain_words(error)
            raise


def _in_plain_words(error: typer.BadParameter) -> str:
    """What is wrong with an option's value. Typer has pydantic look at it, and would show pydantic's own words."""
    if error.__cause__ is None:
        return error.message
    from pydantic import ValidationError

    from qtool.recipe.words import worded

    found = error.__cause__
    return worded(found.errors(include_url=False)[0]) if isinstance(found, ValidationError) else error.message


def _print_version(value: bool) -> None:
    if value:
        print(f"qtool {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """A language model from a hub to a W8A8 checkpoint to generated text.

    Results go to standard output, everything else to standard error. A command that makes a folder
    prints its path, so that commands pipe; `-` reads the path from standard input.
    """


def build() -> typer.core.TyperGroup:
    """The root command, with a placeholder for every command of the table."""
    app = typer.Typer(
        name="qtool",
        cls=LazyGroup,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_root)
    for name, (_, summary) in COMMANDS.items():
        app.command(name, help=summary)(_placeholder)
    return typer.main.get_command(app)  # type: ignore[return-value]


def _placeholder() -> None:
    """Stands in the overview for a command that is not loaded."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: unwinds like Ctrl-C, so that workers are stopped and temporary folders removed."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def _terminate(signum: int, _frame: FrameType | None) -> NoReturn:
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise _Terminated(signum)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line on `args` (None: the process's own) and return the exit code.

    0 done, 1 failed, 2 wrong usage or bad input, 130 interrupted (128 + signal when terminated).
    """
    with contextlib.suppress(ValueError):  # not the main thread
        for name in ("SIGTERM", "SIGHUP"):
            if signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
                signal.signal(getattr(signal, name), _terminate)
    begin()
    common.json = "--json" in (sys.argv[1:] if args is None else args)  # errors before an option is read count, too
    common.quiet = common.debug = common.offline = False
    common.again = None
    if (problem := streams.problem() or _folder_problem()) is not None:
        return _told(problem, common)
    code = 1
    try:
        code = _invoke(lambda: build()(args=args, prog_name="qtool"), common)
        sys.stdout.flush()
    except BrokenPipeError:
        code = 1
        _silence_stdout()
    except OSError as error:  # a full disk
        if code == 0:  # else it has been told, by whoever printed
            code = _told(_unwritable(error, "standard output"), common)
        _silence_stdout()
    return code


def _invoke(command: Callable[[], Any], settings: Common) -> int:
    """Run `command` and turn however it ends into an exit code, having told the user why."""
    try:
        command()
        return 0
    except SystemExit as exit_:
        code = exit_.code
        if code == 130:
            return _interrupted(_interruption(exit_), settings)
        if (usage := getattr(exit_.__context__, "format_message", None)) is not None:  # Typer has told the person
            _as_json(UsageProblem(usage()), settings)
        return code if isinstance(code, int) else int(bool(code))
    except BrokenPipeError:
        raise
    except QtoolError as error:
        return _told(error, settings)
    except Exception as error:
        if (interruption := _interruption(error)) is not None:  # Python 3.11 wraps it while it defines a class
            return _interrupted(interruption, settings)
        if isinstance(error, OSError) and error.errno in NO_SPACE:  # whoever wrote, it is no bug
            return _told(_unwritable(error, error.filename), settings)
        if isinstance(error, OSError) and (told := of_system(error)) is not None:
            return _told(told, settings)
        if settings.debug:
            _show_traceback(error)
            return 1
        what = f"this is a bug in qtool: {type(error).__name__}: {in_one_line(error)}"
        hint = f"Run the same command with --debug and report what it shows{_where_to_report()}."
        return _told(Bug(what, hint=hint), settings)


def _where_to_report() -> str:
    """Where bugs go: the address "Issues" of [project.urls] in pyproject.toml, if there is one."""
    from importlib import metadata

    try:
        addresses = metadata.metadata("qtool").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return ""
    issues = [address for label, _, address in (each.partition(", ") for each in addresses) if label == "Issues"]
    return f" at {issues[0]}" if issues else ""


def _told(error: QtoolError, settings: Common) -> int:
    """Tell the person, and with --json the program."""
    if settings.debug:
        _show_traceback(error)
    from qtool.cli.options import console

    _as_json(error, settings)
    console().error(error)
    return error.exit_code


def _as_json(error: QtoolError, settings: Common) -> None:
    """The error as an object on standard output, where that is asked for and nothing has been printed there yet."""
    if settings.json and not printed():
        from qtool.cli.options import console

        with contextlib.suppress(OSError, QtoolError):  # it can't be written: the person is told all the same
            console().result({"error": error.to_json()})


def _show_traceback(error: BaseException) -> None:
    from qtool.console import visible

    print(visible("".join(traceback.format_exception(error))), file=sys.stderr, end="")


def _folder_problem() -> InputError | None:
    """Relative paths would mean nothing, and some libraries fail in ways of their own."""
    try:
        os.getcwd()
    except OSError as error:
        return InputError(f"can't be used: {error.strerror}", where="the current folder", hint="cd to another one.")
    return None


def _unwritable(error: OSError, where: str | None) -> QtoolError:
    return QtoolError(f"can't be written: {error.strerror}", where=where)


def _interruption(error: BaseException) -> BaseException | None:
    """The Ctrl-C or the signal that led to `error`, if one did."""
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause


def _interrupted(cause: BaseException | None, settings: Common) -> int:
    if settings.debug and cause is not None:
        _show_traceback(cause)
    _as_json(Interrupted("interrupted"), settings)
    print("interrupted", file=sys.stderr)
    if settings.again is not None and not settings.quiet:
        print(f"  → {settings.again}", file=sys.stderr)
    return int(getattr(cause, "exit_code", 130))


def _silence_stdout() -> None:
    """Keep the interpreter from complaining, on its way out, that its output goes nowhere any more."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
