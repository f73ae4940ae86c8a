"""Packages that loading doesn't need and that can't be here, as modules that have whatever is asked of them.

For the scripts beside this one that run in a runtime's own interpreter, where the tests' package is not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import types
from collections.abc import Sequence
from typing import Any
from unittest.mock import MagicMock


class Replaced(types.ModuleType):
    """A module that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=f"{self.__name__}.{name}"))
        return self.__dict__[name]


class Replacer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of these names, and all that are inside them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        wanted = any(fullname == name or fullname.startswith(f"{name}.") for name in self._names)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Replaced(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
