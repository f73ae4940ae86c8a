"""`python -m qtool` and the `qtool` script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code, also when Ctrl-C arrives before it is even loaded."""
    try:
        from qtool.cli import streams

        streams.mend()
        from qtool.cli.app import run

        code = run()
    except KeyboardInterrupt:
        code = 130
    # A Ctrl-C that struck inside exec(), as when a dataclass is being defined, makes `python -m` end by SIGINT whatever
    # the code (CPython 3.11, pymain_exit_err_print), unless another exec() comes after it.
    exec("")
    sys.exit(code)


if __name__ == "__main__":
    main()
