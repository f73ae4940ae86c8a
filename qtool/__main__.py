"""`python -m qtool` and the `qtool` script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code, also when Ctrl-C arrives before it is even loaded."""
    try:
        from qtool.cli.app import run

        code = run()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
