"""`qtool chat` in a terminal of its own. The tiny model talks nonsense; what counts is who may speak when."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qtool.runtimes import GenerationJob
from qtool.runtimes.conversation import Conversation, Refused
from tests.processor import runtime_dtype

_QUIET = 5.0  # seconds


class Terminal:
    """A process with a terminal: what is typed, and what is seen."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.leader, follower = pty.openpty()
        # setsid --ctty makes the terminal the process's own, so that Ctrl-C is for it
        full = ["setsid", "--ctty", "--wait", *command]
        self.process = subprocess.Popen(full, env=env, stdin=follower, stdout=follower, stderr=follower)
        os.close(follower)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def until(self, pattern: str, seconds: float = 120, again: str = "") -> str:
        """What is seen up to the pattern; it is taken away. `again` is typed whenever nothing happens for a while: a
        terminal throws away what is typed just as Ctrl-C arrives."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if not select.select([self.leader], [], [], _QUIET)[0]:
                self.type(again)
                continue
            try:
                self.seen += os.read(self.leader, 1 << 12).decode(errors="replace").replace("\r", "")
            except OSError:
                pytest.fail(f"it ended: {self.seen}")
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def close(self, again: str = "") -> int:
        end = time.monotonic() + 60
        while (code := self.process.poll()) is None:
            assert time.monotonic() < end, self.seen
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_QUIET)
            with contextlib.suppress(OSError):
                self.type(again)
        os.close(self.leader)
        return code


@pytest.fixture
def terminal(qtool_environment: dict[str, str], tiny_llama: Path) -> Iterator[Terminal]:
    options = ["--runtime", "transformers", "--quiet"]
    opened = Terminal([sys.executable, "-m", "qtool", "chat", str(tiny_llama), *options], qtool_environment)
    yield opened
    opened.process.kill()


def test_a_conversation(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.type("hi\n")
    terminal.until(r"hi\n(.|\n)+\n> $")
    terminal.type("/reset\n")
    terminal.until("/reset\n> ", again="/reset\n")
    terminal.type("half a line\x03")
    terminal.until("\n> ", again="\x03")
    terminal.type("/exit\n")
    assert terminal.close(again="/exit\n") == 0


def test_ctrl_c_at_any_moment_of_an_answer_leads_back_to_the_prompt(terminal: Terminal) -> None:
    rng = random.Random(4)
    terminal.until("> ")
    terminal.type("hi\n")
    terminal.until("hi\n(.|\n)")  # the model is loaded
    begin = time.monotonic()
    terminal.until("\n> $")
    whole = time.monotonic() - begin
    for _ in range(12):
        terminal.type("hi\n")
        terminal.until("hi\n")
        time.sleep(rng.uniform(0, 1.2 * whole))
        terminal.type("\x03")
        time.sleep(0.2)  # what is typed together with Ctrl-C is thrown away
        terminal.type("/reset\n")
        terminal.until("/reset\n> $", again="/reset\n")
    terminal.type("/exit\n")
    assert terminal.close(again="/exit\n") == 0


def test_ctrl_d_ends_it(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_the_model_is_loaded_first_and_each_answer_is_measured(
    qtool_environment: dict[str, str], tiny_llama: Path
) -> None:
    options = ["--runtime", "transformers", "--max-tokens", "4", "--temperature", "0"]
    opened = Terminal([sys.executable, "-m", "qtool", "chat", str(tiny_llama), *options], qtool_environment)
    try:
        opened.until("/exit ends(.|\n)*> ")
        opened.type("hi\n")
        answer = opened.until(r"\n\[[^\n]+\]\n> $")
        assert re.search(r"\n\[\d+ tokens", answer)
        if "[4 tokens" in answer:
            assert "cut off" in answer
        opened.type("/exit\n")
        assert opened.close(again="/exit\n") == 0
    finally:
        opened.process.kill()


def test_it_needs_a_terminal(run_qtool: Callable[..., Any], tiny_llama: Path) -> None:
    done = run_qtool("chat", tiny_llama, stdin="hi\n")
    assert done.code == 2
    assert "needs a terminal" in done.stderr


def test_what_was_said_is_remembered_and_forgotten(tiny_llama: Path, tiny_tokenizer: Any) -> None:
    """The answer is what the model says greedily to the whole conversation, as transformers computes it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=getattr(torch, runtime_dtype()))
    sampling = {"temperature": 0.0, "max_tokens": 6}
    job = GenerationJob(model=str(tiny_llama), sampling=sampling, runtime="transformers")
    made = Conversation(job, system="s", on_event=lambda event: None)
    said = [{"role": "system", "content": "s"}]
    for step, question in enumerate(("a", "b", "c")):
        if step == 2:
            made.reset()
            said = said[:1]
        said.append({"role": "user", "content": question})
        ids = tiny_tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        output = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        said.append({"role": "assistant", "content": tiny_tokenizer.decode(output, skip_special_tokens=True)})
        made.ask(question)
        pieces = list(iter(made.listen, None))
        assert "".join(pieces) == said[-1]["content"]
        assert made.messages == said
        made.stop()  # too late: it says nothing to the next question
    made.ask("word " * 600)
    with pytest.raises(Refused, match="the model takes 512"):
        made.listen()
    assert made.messages == said
    made.close()
