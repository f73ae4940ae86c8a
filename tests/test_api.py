"""qtool as a library: what its functions give is what the commands print."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import qtool

DOCS = Path(__file__).parent.parent / "docs"
SMALL: dict[str, Any] = {"samples": 2, "seq_len": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = qtool.quantize(tiny_llama, tmp_path_factory.mktemp("api") / "quantized", scheme="w8a8-dynamic", **SMALL)
    assert result.report.scheme == "w8a8-dynamic"
    assert len(result.report.layers) == 2 * 4
    return result.output


def test_nothing_heavy_is_imported_until_it_is_needed() -> None:
    code = (
        "import sys, qtool; [getattr(qtool, name) for name in ('quantize', 'evaluate', 'generate', 'convert')];"
        "assert not {'torch', 'transformers', 'vllm', 'pydantic', 'rich'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_of_the_same_name_takes_no_function_away() -> None:
    import qtool.conversion
    import qtool.evaluation

    assert all(callable(getattr(qtool, name)) for name in ("convert", "evaluate", "generate", "quantize"))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qtool.quantise


def test_inspect_is_the_commands(made: Path, run_qtool: Callable[..., Any]) -> None:
    assert qtool.inspect(made) == json.loads(run_qtool("inspect", made, "--json").stdout)
    assert {row["scheme"] for row in qtool.inspect(made)["layers"]} == {"W8A8 dynamic", "BF16"}


def test_evaluate_is_the_commands(made: Path, tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    found = qtool.evaluate(tiny_llama, made, windows=2, length=32)
    told = json.loads(run_qtool("eval", tiny_llama, made, "--windows", "2", "--length", "32", "--json").stdout)
    assert found.to_json()["kl_divergence"] == pytest.approx(told["kl_divergence"], rel=1e-4)
    assert found.figures.kl_divergence["value"] > 0


def test_generate_gives_answers_as_they_come(made: Path, run_qtool: Callable[..., Any]) -> None:
    taken: list[str] = []

    def prompts() -> Iterator[str]:
        for prompt in itertools.cycle(("If the", "I am")):
            taken.append(prompt)
            yield prompt

    answers = qtool.generate(made, prompts(), runtime="transformers", max_tokens=4)
    first = list(itertools.islice(answers, 3))
    answers.close()  # type: ignore[attr-defined]
    assert [answer.index for answer in first] == [0, 1, 2]
    assert first[0].text == first[2].text
    assert len(taken) < 5000  # they never end, and were taken as they were needed
    done = run_qtool("generate", made, "-p", "If the", "--runtime", "transformers", "--max-tokens", "4")
    assert json.loads(done.stdout)["text"] == first[0].text


def test_a_prompt_that_is_refused_does_not_end_the_others(made: Path) -> None:
    bad, good = qtool.generate(made, ["word " * 600, "If the"], runtime="transformers", max_tokens=2)
    assert bad.error is not None
    with pytest.raises(qtool.InputError, match="the model takes 512"):
        _ = bad.text
    assert (good.error, good.choices[0].completion_tokens) == (None, 2)


def test_a_conversation(made: Path, run_qtool: Callable[..., Any]) -> None:
    (answer,) = qtool.generate(made, [[{"role": "user", "content": "Hello"}]], runtime="transformers", max_tokens=3)
    done = run_qtool("generate", made, "--chat", "-p", "Hello", "--runtime", "transformers", "--max-tokens", "3")
    assert answer.text == json.loads(done.stdout)["text"]


def test_convert_makes_what_the_command_makes(made: Path, tmp_path: Path, run_qtool: Callable[..., Any]) -> None:
    ours = qtool.convert(made, "modelslim", tmp_path / "ours")
    done = run_qtool("convert", made, "--to", "modelslim", "--output", tmp_path / "theirs")
    assert done.code == 0, done.stderr
    (tensors,) = (file.name for file in ours.glob("*.safetensors"))
    assert (ours / tensors).read_bytes() == (tmp_path / "theirs" / tensors).read_bytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda there: qtool.quantize("/nowhere"), "no such folder"),
        (lambda there: qtool.quantize(there, scheme="w1a1"), "no scheme 'w1a1'"),
        (lambda there: qtool.inspect(there / "config.json"), "not a GGUF file"),
        (lambda there: qtool.download("nobody"), "no recipe is named 'nobody'"),
        (lambda there: list(qtool.generate(there, ["x"], temperature=-1)), "temperature"),
        (lambda there: qtool.convert(there, "modelslim"), "not quantized"),
    ],
)
def test_bad_input(tiny_llama: Path, call: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(qtool.InputError, match=message):
        call(tiny_llama)


def test_warnings_are_pythons(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="dynamic activations"):
        qtool.quantize(tiny_llama, tmp_path / "out", format="golden-stick", scheme="w8a8-dynamic", **SMALL)


def test_the_example_in_the_documents_runs(
    tiny_llama: Path, tmp_path: Path, qtool_environment: Mapping[str, str]
) -> None:
    """As it stands in docs/python.md, but on a tiny model and short text."""
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- library: begin.*?```python\n(.*?)```", page, re.DOTALL)
    for call, short in (
        ('scheme="w8a8-dynamic"', ", samples=2, seq_len=32"),
        ("made.output)\n", "windows=2, length=32"),
        ("max_tokens=8", ', runtime="transformers"'),
    ):
        assert call in code
        code = code.replace(call, f"made.output, {short})\n" if call.endswith("\n") else call + short, 1)
    (tmp_path / "smollm2").symlink_to(tiny_llama)
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=dict(qtool_environment), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    divergence, *answers = done.stdout.splitlines()
    assert 0 < float(divergence) < 1
    assert len(answers) >= 2
    assert (tmp_path / "smollm2-w8a8" / "config.json").exists()


@pytest.mark.slow
def test_the_notebook_runs(tiny_llama: Path, tmp_path: Path, qtool_environment: Mapping[str, str]) -> None:
    """Its cells of code, one after the other, as a program; the last one shows two answers."""
    cells = json.loads((DOCS / "notebooks" / "first.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 5
    assert not any(cell.get("outputs") for cell in cells)
    *lines, last = code[-1].splitlines()
    program = "\n".join([*code[:-1], *lines, f"print(len({last}), 0 < compared.figures.kl_divergence['value'] < 1)"])
    (tmp_path / "smollm2").symlink_to(tiny_llama)
    (tmp_path / "cells.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=dict(qtool_environment), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 True\n"
