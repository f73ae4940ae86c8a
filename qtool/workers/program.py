"""The program that a child's interpreter runs, by this file's path: `program.py ROLE ARGUMENTS`.

The interpreter needs no qtool of its own, and may have another: `import qtool` means the package that this file is part
of, wherever that is. The roles are `child` (a worker) and `guard` (of a command that is not qtool's).
"""

import importlib.util
import sys
from pathlib import Path


def adopt() -> None:
    """Make `import qtool` mean this package, without putting its neighbours on the path."""
    folder = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("qtool", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["qtool"] = package
    spec.loader.exec_module(package)


if __name__ in ("__main__", "__mp_main__"):  # the latter in the processes that a worker spawns
    adopt()
if __name__ == "__main__":
    importlib.import_module(f"qtool.workers.{sys.argv[1]}").serve(sys.argv[2:])
