"""Where answers go as they come: to a terminal as text, into a pipe or a file as JSON lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.runtimes.answers import Answers
    from qtool.runtimes.lines import Line


class Printer(ABC):
    """Keeps the lines that are under way, and counts those that fail.

    Attributes:
        done: prompts that were answered by an earlier run.
    """

    def __init__(self, out: Console) -> None:
        self.out = out
        self.done = self.given = self.failed = 0
        self._lines: dict[int, Line] = {}

    def begin(self, lines: Iterator[Line]) -> Iterator[Line] | None:
        """The lines that are still to be answered, or None if all are."""
        return lines

    def requests(self, numbered: Iterable[tuple[int, Line]]) -> Iterator[dict[str, Any]]:
        """The lines as `qtool.runtimes.stream` wants them."""
        for index, line in numbered:
            self._lines[index] = line
            yield {"index": index, "size": line.size, **line.request}

    def answer(self, item: dict[str, Any]) -> None:
        """The next answer, in the order of the prompts."""
        self.given += 1
        self.failed += "error" in item
        self.show(self._lines.pop(item["index"]), item)

    @abstractmethod
    def show(self, line: Line, item: dict[str, Any]) -> None:
        """Put one answer where it belongs."""

    def event(self, event: dict[str, Any]) -> None:
        self.out.event(event)

    def end(self) -> None:
        """All is answered.

        Raises:
            QtoolError: some prompts have an error for an answer.
        """
        if self.failed:
            total = self.done + self.given
            what = f"{self.failed} of {total} prompts failed" if total > 1 else "the prompt failed"
            raise QtoolError(what, hint="Their answers say why.")


class ToPipe(Printer):
    """JSON lines on stdout."""

    def show(self, line: Line, item: dict[str, Any]) -> None:
        from qtool.runtimes.results import record

        self.out.result(record(line, item), more=True)


class ToFile(Printer):
    """JSON lines in a file that can be continued."""

    def __init__(self, out: Console, file: Answers) -> None:
        super().__init__(out)
        self.file = file

    def begin(self, lines: Iterator[Line]) -> Iterator[Line] | None:
        self.done = self.file.skip(lines)
        self.failed = self.file.errors
        first = next(lines, None)
        if self.done:
            rest = "" if first is not None else ", which is all of them"
            self.out.info(f"{self.done} prompts are already answered{rest}")
        if first is None:
            return None
        self.file.begin()
        return _chain(first, lines)

    def show(self, line: Line, item: dict[str, Any]) -> None:
        from qtool.runtimes.results import record

        self.file.write(record(line, item))

    def end(self) -> None:
        self.file.finish()
        self.out.result(str(self.file.path.absolute()))
        super().end()


class ToTerminal(Printer):
    """Text, as it is written.

    Args:
        titled: there are several: the prompt is shown with each answer even in conversations.
    """

    def __init__(self, out: Console, titled: bool) -> None:
        super().__init__(out)
        self.titled = titled
        self._shown: int | None = None

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] != "piece":
            if event.get("stage") != "generate":  # the text shows how far it is
                super().event(event)
            return
        if self._shown != event["index"]:
            self._shown = event["index"]
            self.out.piece(self._title(self._lines[event["index"]]))
        self.out.piece(event["text"])

    def show(self, line: Line, item: dict[str, Any]) -> None:
        self._text(line, item)
        if cut := [choice for choice in item.get("choices", ()) if choice["finish_reason"] == "length"]:
            self.out.info(f"[cut off after {cut[0]['completion_tokens']} tokens: --max-tokens allows more]")

    def _text(self, line: Line, item: dict[str, Any]) -> None:
        gap = "\n" if self.titled else ""
        if "error" in item:
            self.out.result(f"{self._title(line)}[error: {item['error']}]{gap}", more=True)
        elif self._shown == item["index"]:
            self.out.result(gap, more=True)
        else:
            texts = "\n\n".join(choice["text"] for choice in item["choices"])
            self.out.result(f"{self._title(line)}{texts}{gap}", more=True)

    def _title(self, line: Line) -> str:
        """A prompt that the answer continues, or what the user says."""
        messages = line.request.get("messages")
        if messages is None:
            return str(line.fields.get("prompt", ""))
        return f"> {messages[-1].get('content', '')}\n" if self.titled else ""


def _chain(first: Line, rest: Iterator[Line]) -> Iterator[Line]:
    yield first
    yield from rest
