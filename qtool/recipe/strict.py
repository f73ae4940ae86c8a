"""What all parts of a recipe have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from qtool import patterns

WRONG = "qtool"


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def wrong(key: str, message: str) -> PydanticCustomError:
    """What a validator of a whole mapping raises about one key of it; recipe.load finds the line by it."""
    return PydanticCustomError(WRONG, "{message}", {"key": key, "message": message})


def short_for(key: str, default: str | None = None) -> Callable[[Any], Any]:
    """A validator that takes a string for a mapping with nothing but `key`, and adds a missing `key`'s default."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {key: value}
        if isinstance(value, dict) and default is not None:
            return {key: default, **value}
        return value

    return expand


def _valid_regex(pattern: str) -> str:
    patterns.check(pattern)
    return pattern


Regex = Annotated[str, AfterValidator(_valid_regex)]
