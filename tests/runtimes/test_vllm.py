"""What vLLM is asked for, against what must come of it: one start of the engine for many wishes."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import runtimes
from qtool.environments import lookup
from qtool.errors import QtoolError
from qtool.runtimes import GenerationJob
from qtool.runtimes.batch import CHAT_URL, COMPLETIONS_URL
from qtool.runtimes.job import WorkerJob
from qtool.runtimes.worker import vllm_settings
from qtool.runtimes.worker.front import Front
from qtool.workers import Report
from tests.zoo import models

pytestmark = pytest.mark.vllm
Run = Callable[..., Any]
PROMPT = "The import statement"
SCHEMA = {"enum": ["abc", "abd"]}  # left to itself, the tiny model would write nothing but blanks


def wish(name: str, url: str = COMPLETIONS_URL, **body: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "x"}]} if url == CHAT_URL else {"prompt": PROMPT}
    return {"custom_id": name, "method": "POST", "url": url, "body": {"max_tokens": 12, **asked, **body}}


WISHES = [
    wish("plain", logprobs=2),
    wish("chat", CHAT_URL, logprobs=True, top_logprobs=1),
    wish("n", n=3, temperature=1.0, seed=4),
    wish("again", n=3, temperature=1.0, seed=4),
    wish("min", min_tokens=9, stop_token_ids=list(range(4, 512))),
    wish("bias", logit_bias={"77": 100}),
    wish("allowed", allowed_token_ids=[50, 51]),
    wish(
        "json", max_tokens=40, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    ),
    wish("regex", structured_outputs={"regex": "(ab|cd){3}"}),
    wish("choice", structured_outputs={"choice": ["yes", "no"]}),
    wish("long", prompt="word " * 600),
    wish("bad", structured_outputs={"regex": "("}),
    wish("outside", prompt=[5, 99999]),
    wish("contradiction", structured_outputs={"choice": ["yes"]}, allowed_token_ids=[50]),
    wish("half", prompt="\ud83d"),
    wish("ids", prompt=[5, 6, 7]),
]


@pytest.fixture(scope="module")
def bodies(run_qtool: Run, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("batch") / "batch.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in WISHES))
    done = run_qtool("generate", tiny_llama, "-p", f"@{file}", "--set", "max_num_seqs=4", "--seed", "-1")
    assert done.code == 1, done.stderr  # some of them can't be
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in WISHES]
    return {answer["custom_id"]: answer["response"]["body"] for answer in answers}


def texts(body: dict[str, Any]) -> list[str]:
    return [choice.get("text", choice.get("message", {}).get("content")) for choice in body["choices"]]


def logits(model: Path, ids: list[int]) -> Any:
    """What transformers computes after each of the tokens: log-probabilities float32 [tokens, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_log_probabilities_are_the_models(bodies: dict[str, Any], tiny_llama: Path, tiny_tokenizer: Any) -> None:
    (choice,) = bodies["plain"]["choices"]
    ids = tiny_tokenizer(PROMPT)["input_ids"]
    assert bodies["plain"]["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": 12, "total_tokens": len(ids) + 12,
    }  # fmt: skip
    places = choice["logprobs"]
    assert len(places["tokens"]) == 12
    assert choice["text"].startswith(places["tokens"][0])
    first = logits(tiny_llama, ids)[-1]
    best = first.topk(2)
    assert places["token_logprobs"][0] == pytest.approx(float(best.values[0]), abs=0.1)
    top = {tiny_tokenizer.decode([int(i)]): float(v) for i, v in zip(best.indices, best.values, strict=True)}
    assert places["top_logprobs"][0] == pytest.approx(top, abs=0.1)


def test_a_conversation_goes_through_the_models_template(
    bodies: dict[str, Any], tiny_llama: Path, tiny_tokenizer: Any
) -> None:
    text = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"  # the template of the tests' tokenizer
    ids = tiny_tokenizer(text)["input_ids"]
    assert bodies["chat"]["usage"]["prompt_tokens"] == len(ids)
    place = bodies["chat"]["choices"][0]["logprobs"]["content"][0]
    assert place["logprob"] == pytest.approx(float(logits(tiny_llama, ids)[-1].max()), abs=0.1)


def test_what_is_asked_for_comes(bodies: dict[str, Any], tiny_tokenizer: Any) -> None:
    assert len(set(texts(bodies["n"]))) == 3
    assert texts(bodies["n"]) == texts(bodies["again"])  # a request's own seed, whatever its place
    assert bodies["min"]["usage"]["completion_tokens"] == 10  # the first one that may, ends it
    assert texts(bodies["bias"]) == [tiny_tokenizer.decode([77] * 12)]
    assert set(tiny_tokenizer(texts(bodies["allowed"])[0])["input_ids"]) <= {50, 51}
    assert json.loads(texts(bodies["json"])[0]) in SCHEMA["enum"]
    assert re.fullmatch("(ab|cd){3}", texts(bodies["regex"])[0])
    assert texts(bodies["choice"])[0] in ("yes", "no")
    assert bodies["choice"]["choices"][0]["finish_reason"] == "stop"
    assert bodies["ids"]["usage"]["prompt_tokens"] == 3


def test_what_cannot_be_has_its_own_error(bodies: dict[str, Any]) -> None:
    assert "the model takes 512" in bodies["long"]["error"]["message"]
    assert "vLLM refuses it" in bodies["bad"]["error"]["message"]
    assert "99999" in bodies["outside"]["error"]["message"]
    assert "ended it with an error" in bodies["contradiction"]["error"]["message"]
    assert "surrogates not allowed" in bodies["half"]["error"]["message"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_nu_seqs=4", "max_num_seqs"),
        ("max_num_seqs=many", "must be a whole number"),
        ("OMP_NUM_THREAD=4", "OMP_NUM_THREADS"),
    ],
)
def test_settings_are_vllms(run_qtool: Run, tiny_llama: Path, setting: str, message: str) -> None:
    done = run_qtool("generate", tiny_llama, "-p", "x", "--set", setting)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert "--set" in done.stderr


def test_text_is_split_from_thinking(run_qtool: Run, make_model: Callable[..., Path]) -> None:
    """The model can only say `</think>` and then one word, and its vocabulary has the marks."""
    from transformers import AutoTokenizer

    model = make_model("llama", name="thinker", vocab_size=514)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(model)
    regex = ("--regex", "hm</think>yes", "--max-tokens", "30", "--runtime", "vllm")
    done = run_qtool("generate", model, "--chat", "-p", "x", *regex, "--reasoning-parser", "deepseek_r1")
    assert done.code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["reasoning"], answer["text"]) == ("hm", "yes")
    done = run_qtool("generate", model, "--chat", "-p", "x", "--reasoning-parser", "deepseek_r9")
    assert done.code == 2
    assert "deepseek_r1" in done.stderr


def test_sizes_go_by_other_names_too(run_qtool: Run, make_model: Callable[..., Path]) -> None:
    """GPT-2 calls them n_embd, n_head, n_positions. And -1 leaves the length to what there is room for."""
    model = make_model("gpt2", hidden_size=128, num_key_value_heads=4)
    assert "num_attention_heads" not in json.loads((model / "config.json").read_text())
    prompts = ("-p", "If the", "-p", "word " * 600)
    for options in (("--runtime", "transformers"), ("--runtime", "vllm", "--set", "max_model_len=-1")):
        done = run_qtool("generate", model, *prompts, "--max-tokens", "4", *options)
        assert done.code == 1, done.stderr
        answer, refused = (json.loads(line) for line in done.stdout.splitlines())
        assert answer["completion_tokens"] == 4
        assert "the model takes 512" in refused["error"]


def test_the_engine_is_made_to_measure(tiny_llama: Path) -> None:
    """Where its process is this one and the machine's settings say how much memory it may have, as they do on CPUs."""
    per_token, block = 2 * 2 * 2 * 32 * 2, vllm_settings.BLOCK

    def arguments(
        engine: dict[str, Any], lengths: list[int], complete: bool, in_process: bool = True
    ) -> dict[str, Any]:
        job = WorkerJob(model=str(tiny_llama), dtype="bfloat16", engine=engine)
        front = Front(job, Report(os.dup(1)))
        return vllm_settings.arguments(front, vllm_settings.Ahead(lengths, complete), in_process)

    cpu = {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 30}
    made = arguments(cpu, [100, 200], complete=True)
    assert made["max_model_len"] == 200
    assert made["kv_cache_memory_bytes"] == per_token * (block + 2 * block + block)
    assert arguments(cpu | {"max_model_len": -1}, [100, 200], complete=True) == made
    assert arguments(cpu, [], complete=False)["max_model_len"] == 512
    assert arguments(cpu | {"max_model_len": None, "block_size": None}, [], complete=False)["max_model_len"] == 512
    for left in ({}, {"kv_cache_memory_bytes": None}):
        assert not {"kv_cache_memory_bytes", "max_model_len"} & arguments(left, [], complete=False).keys()
    assert arguments({"max_model_len": -1}, [], complete=False)["max_model_len"] == -1
    assert "max_model_len" not in arguments(cpu, [], complete=False, in_process=False)


def test_what_nobody_has_set_is_not_to_blame(tiny_llama: Path, tmp_path: Path) -> None:
    """`chat` asks for one sequence at a time by itself."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["Nonesuch"]}
    (model / "config.json").write_text(json.dumps(config))

    def load(**arguments: Any) -> QtoolError:
        job = GenerationJob(model=str(model), runtime="vllm", arguments=arguments, one_at_a_time=True)
        with pytest.raises(QtoolError, match="Nonesuch") as caught:
            runtimes.stream(job, iter([{"index": 0, "prompt": "x"}]), print)
        return caught.value

    assert load().where == str(model)
    assert load(enforce_eager=True).where == "--set"


def test_a_package_that_a_model_of_vllms_needs(run_qtool: Run, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Qwen3.5 imports torchvision, even for text alone."""
    if lookup.available("torchvision"):
        pytest.skip("torchvision is installed")
    model = models.make("text", "qwen3_5_text", tmp_path / "model")
    tiny_tokenizer.save_pretrained(model)
    done = run_qtool("generate", model, "--runtime", "vllm", "--prompt", PROMPT, "--max-tokens", "2")
    assert (done.code, done.stdout) == (1, "")
    assert "Qwen3_5ForCausalLM needs a package that isn't here: torchvision" in done.stderr
    assert "pip install torchvision" in done.stderr
