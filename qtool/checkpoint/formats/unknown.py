"""What qtool doesn't read."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.base import Format, UnknownScheme
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint


class Unknown(Format):
    """Stands for the format of a folder that is none of the others; `hint` says what qtool reads instead."""

    title = "not read by qtool"

    def __init__(self, name: str, hint: str) -> None:
        self.name = name
        self.hint = hint

    def detect(self, config: Mapping[str, Any], files: Container[str]) -> bool:
        return True

    def scheme(self, checkpoint: Checkpoint, name: str) -> Scheme | None:
        raise UnknownScheme(
            f"quantized with {self.name}, which qtool doesn't read", where=str(checkpoint.path), hint=self.hint
        )
