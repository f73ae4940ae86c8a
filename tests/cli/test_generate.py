"""`qtool generate` as its users see it. The tiny model talks nonsense; what counts is how it arrives."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import Launcher

Run = Callable[..., Any]
FAST = ("--runtime", "transformers", "--max-tokens", "4")


def test_a_pipe_gets_json_lines_in_the_order_of_the_prompts(run_qtool: Run, tiny_llama: Path) -> None:
    prompts = ["If the", "x", "The import é\u2028 statement"]
    done = run_qtool("generate", tiny_llama, *FAST, stdin=f"{prompts[0]}\n\n  \n{prompts[1]}\r\n{prompts[2]}")
    assert done.code == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.rstrip("\n").split("\n")]
    assert [answer["prompt"] for answer in answers] == prompts
    for answer in answers:
        assert list(answer) == ["prompt", "text", "finish_reason", "prompt_tokens", "completion_tokens"]
        assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 4)
    assert "3 answers, 12 tokens" in done.stderr
    again = run_qtool("generate", tiny_llama, *FAST, "--json", "--quiet", *(f"--prompt={p}" for p in prompts))
    assert (again.stdout, again.stderr) == (done.stdout, "")


def test_the_path_may_come_from_a_pipe(run_qtool: Run, tiny_llama: Path) -> None:
    done = run_qtool("generate", "-", "--prompt", "x", *FAST, stdin=f"{tiny_llama}\n")
    assert json.loads(done.stdout)["prompt"] == "x"


def test_sampling_follows_its_options(run_qtool: Run, tiny_llama: Path) -> None:
    def text(*options: str) -> str:
        options = ("--runtime", "transformers", "--max-tokens", "12", *options)
        return str(json.loads(run_qtool("generate", tiny_llama, "-p", "x", *options).stdout)["text"])

    greedy = text()  # the recipe's default
    assert text("--temperature", "2", "--top-p", "0.0001") == greedy
    assert text("--temperature", "2", "--seed", "1") != text("--temperature", "2", "--seed", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompts"),
        (["--runtime", "mlx", "-p", "x"], "unknown runtime 'mlx'"),
        (["--top-p", "0", "-p", "x"], "greater than 0"),
        (["--max-tokens", "0", "-p", "x"], "--max-tokens"),
        (["--temperature", "-1", "-p", "x"], "--temperature"),
        (["--temperature", "3", "-p", "x"], "--temperature"),
        (["--repetition-penalty", "0", "-p", "x"], "--repetition-penalty"),
        (["--seed", str(1 << 63), "-p", "x"], "--seed"),
        (["--min-tokens", "9", "--max-tokens", "4", "-p", "x"], "--min-tokens is 9, which is more than max_tokens (4)"),
        (["--logit-bias", "x=1", "-p", "x"], "not ID=BIAS"),
        (["--regex", "a", "--choice", "b", "-p", "x"], "one structure"),
        (["--resume", "-p", "x"], "--output"),
        (["--input-format", "csv", "-p", "x"], "csv"),
        (["--chat-template-kwargs", "[]", "-p", "x"], "JSON object"),
        (["--set", "max_num_seqs", "-p", "x"], "not KEY=VALUE"),
        (["--json-schema", "absent.json", "-p", "x"], "absent.json"),
        (["-p", "@absent.txt"], "absent.txt"),
        (["--runtime", "transformers", "--presence-penalty", "1", "-p", "x"], "can't do presence_penalty"),
        (["--runtime", "transformers", "--regex", "a", "-p", "x"], "can't do structured_outputs"),
        (["--runtime", "transformers", "--set", "seed=1", "-p", "x"], "--set is for vLLM"),
    ],
)
def test_bad_usage(run_qtool: Run, tiny_llama: Path, arguments: list[str], message: str) -> None:
    done = run_qtool("generate", tiny_llama, *arguments, stdin="\n  \n")
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_stdin_cannot_be_path_and_prompts(run_qtool: Run) -> None:
    done = run_qtool("generate", "-", stdin="x\n")
    assert done.code == 2
    assert "not both" in done.stderr


def test_a_prompt_that_fails_has_its_own_error(
    qtool_environment: dict[str, str], launcher: Launcher, tiny_llama: Path
) -> None:
    lines = [b"ok", b"\xff\xfe", b"word " * 600, b"fine"]
    command = ["generate", str(tiny_llama), *FAST]
    done = launcher.run(command, input=b"\n".join(lines), env=qtool_environment, capture_output=True, timeout=120)
    assert done.returncode == 1
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in answer for answer in answers] == [False, True, True, False]
    assert "byte 0 of the line is not UTF-8" in answers[1]["error"]
    assert "the model takes 512" in answers[2]["error"]
    assert b"2 of 4 prompts failed" in done.stderr


def test_a_line_that_no_tokenizer_takes_has_its_own_error(run_qtool: Run, tiny_llama: Path, tmp_path: Path) -> None:
    """And a seed beyond all others is one: seed + i begins anew at 0."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [
        {"prompt": "ok"},
        {"prompt": "half \ud83d"},
        {"messages": [{"role": "user", "content": "\udcff"}]},
        {"prompt": "fine"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = (
        "generate",
        tiny_llama,
        *FAST,
        "-p",
        f"@{prompts}",
        "-o",
        output,
        "--temperature",
        "1",
        "--seed",
        (1 << 63) - 1,
    )
    done = run_qtool(*map(str, asked))
    assert done.code == 1, done.stderr
    assert "2 of 4 prompts failed" in done.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["error" in answer for answer in answers] == [False, True, True, False]
    assert "surrogates not allowed" in answers[1]["error"]
    assert run_qtool(*map(str, asked), "--resume").code == 1  # they are answered


@pytest.mark.parametrize("arguments", [["--version"], ["recipes", "list"], ["generate", "MODEL", "-p", "x", *FAST]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_on_a_full_disk(
    qtool_environment: dict[str, str], launcher: Launcher, tiny_llama: Path, arguments: list[str], unbuffered: str
) -> None:
    command = [*(str(tiny_llama) if word == "MODEL" else word for word in arguments)]
    env = qtool_environment | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = launcher.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    (error,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert error == "error: can't be written: No space left on device"


def test_the_output_is_a_file(run_qtool: Run, tiny_llama: Path) -> None:
    done = run_qtool("generate", tiny_llama, "-p", "x", *FAST, "-o", "/dev/full", "--overwrite")
    assert done.code == 2
    assert "not a regular file" in done.stderr


@pytest.mark.parametrize("options", [("-o", "LINK", "--overwrite"), ("-o", "FILE", "--resume"), ()])
@pytest.mark.parametrize("redirected", [True, False])
def test_answers_never_go_where_the_prompts_are(
    qtool_environment: dict[str, str],
    launcher: Launcher,
    tiny_llama: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    redirected: bool,
) -> None:
    """Not through a link or a redirection either; without --output, not to the end of the file."""
    names = {"FILE": str(tmp_path / "x.jsonl"), "LINK": str(tmp_path / "link.jsonl")}
    prompts = Path(names["FILE"])
    prompts.write_text('{"prompt": "a"}\n')
    Path(names["LINK"]).symlink_to(prompts)
    command = ["generate", str(tiny_llama), *FAST]
    command += [names.get(word, word) for word in options]
    command += [] if redirected else ["-p", f"@{prompts}"]
    with prompts.open() as stdin, prompts.open("a") as stdout:
        done = launcher.run(
            command,
            env=qtool_environment,
            stdin=stdin if redirected else subprocess.DEVNULL,
            stdout=subprocess.PIPE if options else stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2, done.stderr
    assert "the prompts are read from the same file" in done.stderr
    assert prompts.read_text() == '{"prompt": "a"}\n'


def test_bad_models_fail_before_anything_starts(run_qtool: Run, tiny_llama: Path, tmp_path: Path) -> None:
    done = run_qtool("generate", tmp_path / "absent", "-p", "x")
    assert done.code == 2
    assert str(tmp_path / "absent") in done.stderr
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "quantization_description.json").write_text("{}")
    done = run_qtool("generate", model, "-p", "x")
    assert done.code == 2
    assert "vllm_mindspore" in done.stderr
    (model / "quantization_description.json").unlink()
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run_qtool("generate", model, "-p", "x")
    assert done.code == 2
    assert str(weights) in done.stderr
    assert "load the model" not in done.stderr


def test_a_terminal_gets_text(qtool_environment: dict[str, str], launcher: Launcher, tiny_llama: Path) -> None:
    leader, follower = pty.openpty()
    command = ["generate", str(tiny_llama), "-p", "If the", "-q", *FAST]
    with launcher.start(command, env=qtool_environment, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        data = b""
        with contextlib.suppress(OSError):
            while chunk := os.read(leader, 1 << 16):
                data += chunk
    os.close(leader)
    assert process.returncode == 0
    assert data.startswith(b"If the")
    assert b"finish_reason" not in data


def test_ctrl_c_leaves_no_process_behind(
    qtool_environment: dict[str, str], launcher: Launcher, tiny_llama: Path
) -> None:
    command = ["generate", str(tiny_llama), "-p", "x", "--raw", *FAST]
    process = launcher.start(command, env=qtool_environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "load the model\n"  # the worker is at work
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    os.killpg(process.pid, signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    for _ in range(50):
        if not Path(f"/proc/{children[0]}/cmdline").exists() or not Path(f"/proc/{children[0]}/cmdline").read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")
