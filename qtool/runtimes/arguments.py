"""`--set key=value`: what the user says to vLLM over the settings for the hardware."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qtool.errors import InputError

SECRETS = {"api_key": "VLLM_API_KEY", "hf_token": "HF_TOKEN"}
"""Settings that nobody else may see, and the variable that stands for each: every user of a machine can read command
lines. Whatever they look like, they are text."""
_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")


def parse(pairs: Iterable[str]) -> dict[str, Any]:
    """`--set key=value` as a mapping; values are YAML (numbers, true, null, {..}); dashes in keys are underscores.

    Raises:
        InputError: no `=`, or the value is not YAML.
    """
    import yaml

    given = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise InputError(f"{pair!r} is not KEY=VALUE", where="--set", hint="Like --set max_num_seqs=32.")
        try:
            given[key] = value if key.isupper() or key in SECRETS else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"the value of {key} is not YAML", where="--set", hint="Quote it.") from error
    return given


def is_secret(name: str) -> bool:
    """Whether a setting or a variable is one that nobody else may see."""
    return name in SECRETS or _SECRET.search(name) is not None


def split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What of it are EngineArgs, and what (in capitals) are environment variables."""
    engine = {name: value for name, value in given.items() if not name.isupper()}
    return engine, {name: str(value) for name, value in given.items() if name.isupper()}
