"""What a prompt is: a text, token ids or a conversation, with what its answer repeats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NO_MESSAGES = "messages is not a list of objects with role and content"
NO_PROMPT = "prompt is neither a text nor a list of token ids"


@dataclass(frozen=True)
class Line:
    """One prompt as it came.

    Attributes:
        fields: what the answer repeats: `prompt`, or all that a JSON line has.
        request: what `qtool.runtimes.stream` wants, but for the index: prompt or messages, or error.
        url: the endpoint of a line of an OpenAI batch file, whose answer has that API's shape; else None.
        size: bytes of the line, of whose fields any may be the large one; 0 for what came as an argument.
    """

    fields: dict[str, Any]
    request: dict[str, Any]
    url: str | None = None
    size: int = 0


@dataclass(frozen=True)
class Chat:
    """How prompts become conversations; `messages` are conversations anyway.

    Args:
        every: plain prompts too, as what the user says.
        system: what the system says first, where it says nothing yet.
    """

    every: bool = False
    system: str | None = None

    def request(self, prompt: Any) -> dict[str, Any]:
        if not self.every or not isinstance(prompt, str):
            return {"prompt": prompt}
        return self.conversation([{"role": "user", "content": prompt}])

    def conversation(self, messages: list[Any]) -> dict[str, Any]:
        first = messages[0] if messages else None
        if self.system is None or (isinstance(first, Mapping) and first.get("role") == "system"):
            return {"messages": messages}
        return {"messages": [{"role": "system", "content": self.system}, *messages]}


def is_conversation(messages: Any) -> bool:
    """Whether it has the shape that chat templates take."""
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) and "role" in m for m in messages)


def is_prompt(prompt: Any) -> bool:
    """Whether it is a text, or token ids."""
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
    return isinstance(prompt, str)
