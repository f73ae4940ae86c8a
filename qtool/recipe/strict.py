"""What all parts of a recipe have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from qtool import patterns
from qtool.recipe.words import WRONG


class Strict(BaseModel):
    """Unknown keys are errors. All that is wrong is told at once: with single keys, and with several together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def disagreements(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Keys that don't fit together, as (key, what is wrong with it).

        Args:
            given: the mapping as it is written. A value may be of any type: other checks tell where it is wrong.
        """
        yield from ()

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, given: Any, handler: pydantic.ModelWrapValidatorHandler[Self]) -> Self:
        wrong_together = list(cls.disagreements(given)) if isinstance(given, Mapping) else []
        details = [
            InitErrorDetails(type=wrong(key, message), loc=(), input=given.get(key)) for key, message in wrong_together
        ]
        try:
            made = handler(given)
        except pydantic.ValidationError as error:
            if not details:
                raise
            found = [_details(item) for item in error.errors(include_url=False)]
            raise pydantic.ValidationError.from_exception_data(cls.__name__, found + details) from None
        if details:
            raise pydantic.ValidationError.from_exception_data(cls.__name__, details)
        return made


def _details(item: Any) -> InitErrorDetails:
    """An error as `from_exception_data` takes it."""
    context = item.get("ctx", {})
    kind = PydanticCustomError(WRONG, "{message}", context) if item["type"] == WRONG else item["type"]
    return InitErrorDetails(type=kind, loc=item["loc"], input=item["input"], ctx=context)


def wrong(key: str, message: str) -> PydanticCustomError:
    """What is wrong with one key of a mapping; recipe.load finds the line by it."""
    return PydanticCustomError(WRONG, "{message}", {"key": key, "message": message})


@dataclass(frozen=True)
class ShortFor:
    """Marks a union told apart by `key`: a string is short for a mapping with nothing but that key.

    Attributes:
        key: method or mode.
        default: what a mapping without it means.
    """

    key: str
    default: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._expand, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        described = handler(schema)
        union = handler.resolve_ref_schema(described)
        names = list(union["discriminator"]["mapping"])
        whole = [self._without_key(handler, each) for each in union["oneOf"]] if self.default else union["oneOf"]
        return {"anyOf": [{"enum": names}, *whole]}

    def _without_key(self, handler: GetJsonSchemaHandler, member: dict[str, Any]) -> dict[str, Any]:
        """A member of the union, with the key left to its default."""
        found = handler.resolve_ref_schema(member)
        found["required"] = [key for key in found.get("required", []) if key != self.key]
        return member

    def _expand(self, value: Any) -> Any:
        if isinstance(value, str):
            return {self.key: value}
        if isinstance(value, dict) and self.default is not None:
            return {self.key: self.default, **value}
        return value


def _valid_regex(pattern: str) -> str:
    patterns.check(pattern)
    return pattern


Regex = Annotated[str, AfterValidator(_valid_regex), WithJsonSchema({"type": "string", "format": "regex"})]
