"""What pydantic finds wrong with a value, in words for people: the only place that puts them.

pydantic's own texts ("Input should be …", "Value error, …") speak of Python and are never shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WRONG = "qtool"
"""The type of an error whose message is for people already; see `qtool.recipe.strict.wrong`."""

_MAPPING = "must be a mapping of keys to values, not {value}"
_INTEGER = "must be a whole number, not {value}"
_NUMBER = "must be a number, not {value}"
_TEXT = "must be text, not {value}"

# pydantic's name for what is wrong: the words for it. In braces: `value`, and what pydantic tells besides.
_WORDS = {
    "missing": "is missing",
    "union_tag_not_found": "is missing",
    "extra_forbidden": "unknown key",
    "invalid_key": "keys must be text",
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "dataclass_type": _MAPPING,
    "dict_type": _MAPPING,
    "mapping_type": _MAPPING,
    "none_required": "must be empty (null), not {value}",
    "greater_than": "must be greater than {gt}, not {value}",
    "greater_than_equal": "must be {ge} or more, not {value}",
    "less_than": "must be less than {lt}, not {value}",
    "less_than_equal": "must be {le} or less, not {value}",
    "multiple_of": "must be a multiple of {multiple_of}, not {value}",
    "finite_number": "must be a finite number, not {value}",
    "too_short": "must have at least {min_length} entries, not {value}",
    "too_long": "must have at most {max_length} entries, not {value}",
    "string_type": _TEXT,
    "string_unicode": "must be UTF-8 text, not {value}",
    "string_sub_type": _TEXT,
    "string_too_short": "must have at least {min_length} characters, not {value}",
    "string_too_long": "must have at most {max_length} characters, not {value}",
    "string_pattern_mismatch": "must match {pattern}, not be {value}",
    "enum": "must be {expected}, not {value}",
    "literal_error": "must be {expected}, not {value}",
    "list_type": "must be a list, not {value}",
    "tuple_type": "must be a list, not {value}",
    "set_type": "must be a list, not {value}",
    "bool_type": "must be true or false, not {value}",
    "bool_parsing": "must be true or false, not {value}",
    "int_type": _INTEGER,
    "int_parsing": _INTEGER,
    "int_from_float": _INTEGER,
    "int_parsing_size": "must be a whole number of fewer digits, not {value}",
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "union_tag_invalid": "must be {expected_tags}, not {tag!r}",
    "value_error": "{error}",
    "assertion_error": "{error}",
    WRONG: "{message}",
}
_OTHER = "can't be {value}"

NAME = r"^[a-z0-9][a-z0-9._-]*$"
REPOSITORY = r"^[^/\s]+/[^/\s]+$"

FORMS = {
    NAME: "must be of lower-case letters, digits, '.', '_' and '-', and begin with a letter or digit",
    REPOSITORY: "must look like ORG/NAME",
}
"""What the patterns ask for."""

FORM = "patternErrorMessage"
"""The key of JSON Schemas under which editors that check YAML look for these words."""


def worded(error: Mapping[str, Any]) -> str:
    """One of the errors of a `pydantic.ValidationError`, without the key that it is about.

    Args:
        error: with type, input and ctx.
    """
    kind = str(error["type"])
    context = {key: f"{it:g}" if isinstance(it, float) else it for key, it in (error.get("ctx") or {}).items()}
    if kind == "string_pattern_mismatch" and context["pattern"] in FORMS:
        return f"{FORMS[context['pattern']]}, not {short(error['input'])}"
    if kind == "union_tag_invalid":
        context["expected_tags"] = _either(str(context["expected_tags"]))
    return _WORDS.get(kind, _OTHER).format_map({"value": short(error["input"]), **context})


def short(value: Any) -> str:
    """A value as YAML and Python write it, cut off where it is long."""
    text = "empty" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _either(tags: str) -> str:
    """ "'a', 'b', 'c'" → "'a', 'b' or 'c'"."""
    before, _, last = tags.rpartition(", ")
    return f"{before} or {last}" if before else last
