"""Both runtimes against transformers' own generate, and against each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import runtimes
from qtool.errors import InputError, QtoolError
from tests.processor import runtime_dtype

PROMPTS = ["The import statement", "If the", "A class definition is an executable", "x = 1"]
MAX_TOKENS = 24
Answers = Callable[[str, str], list[dict[str, Any]]]


def common(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """How many tokens the two answers share before they part."""
    pairs = zip(ours["token_ids"], theirs["token_ids"], strict=False)
    return next((step for step, (a, b) in enumerate(pairs) if a != b), min(len(ours["gaps"]), len(theirs["gaps"])))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_transformers_says_what_its_own_generate_says(
    answers: Answers, kind: str, tiny_llama: Path, tiny_int8: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_llama if kind == "float" else tiny_int8
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, runtime_dtype()))
    for answer, prompt in zip(answers("transformers", kind), PROMPTS, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        count = inputs["input_ids"].shape[1]
        output = model.generate(
            **inputs, max_new_tokens=MAX_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        expected = output.sequences[0, count:].tolist()
        assert answer["token_ids"] == expected
        assert answer["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer["prompt"] == prompt
        assert (answer["prompt_tokens"], answer["completion_tokens"]) == (count, len(expected))
        ended = expected[-1] == tokenizer.eos_token_id
        assert answer["finish_reason"] == ("stop" if ended else "length")
        top = torch.stack(output.logits)[:, 0].float().topk(2).values
        assert answer["gaps"] == pytest.approx((top[:, 0] - top[:, 1]).tolist())


@pytest.mark.vllm
@pytest.mark.parametrize(("kind", "tie", "noise"), [("float", 0.0625, 0.1875), ("int8", 0.125, 0.375)])
def test_vllm_says_what_transformers_says(answers: Answers, kind: str, tie: float, noise: float) -> None:
    """Token for token. Where they part, it is a tie: to both, the two likeliest tokens are at most a rounding apart.

    Logits are around 10 here, where bfloat16 goes in steps of 0.0625. Both compute int8 layers from the same
    integers, but round activations in different precisions, which moves logits a little further. How far depends on
    the processor: without AVX-512 both add up in another order.
    """
    shared = 0
    for ours, theirs in zip(answers("vllm", kind), answers("transformers", kind), strict=True):
        assert ours["index"] == theirs["index"]
        assert ours["prompt_ids"] == theirs["prompt_ids"]
        steps = common(ours, theirs)
        shared += steps
        assert ours["gaps"][:steps] == pytest.approx(theirs["gaps"][:steps], abs=noise)
        if ours["token_ids"] != theirs["token_ids"]:
            assert max(ours["gaps"][steps], theirs["gaps"][steps]) <= tie
    assert shared >= len(PROMPTS) * MAX_TOKENS / 3


@pytest.mark.vllm
def test_vllm_does_run_int8(answers: Answers) -> None:
    assert [a["token_ids"] for a in answers("vllm", "int8")] != [a["token_ids"] for a in answers("vllm", "float")]


@pytest.mark.vllm
def test_the_command_line_takes_vllm_where_it_is_installed(run_qtool: Callable[..., Any], tiny_llama: Path) -> None:
    done = run_qtool("generate", tiny_llama, "-p", "x", "--max-tokens", "4")
    assert done.code == 0, done.stderr
    assert "start vLLM" in done.stderr
    assert json.loads(done.stdout)["completion_tokens"] == 4


@pytest.mark.vllm
def test_vllm_samples_what_the_model_would_write(tiny_llama: Path) -> None:
    texts = runtimes.sample(tiny_llama, 3, 20, seed=1, runtime="vllm")
    assert [len(ids) for ids in texts] == [20] * 3
    assert {ids[0] for ids in texts} == {0}
    assert len({tuple(ids) for ids in texts}) == 3


def test_samples_depend_on_the_seed_only(tiny_llama: Path) -> None:
    def sample(n: int, seed: int) -> list[list[int]]:
        return runtimes.sample(tiny_llama, n, 20, seed=seed, runtime="transformers")

    texts = sample(3, 1)
    assert [len(ids) for ids in texts] == [20] * 3
    assert {ids[0] for ids in texts} == {0}  # the tokenizer's beginning of text
    assert len({tuple(ids) for ids in texts}) == 3
    assert sample(2, 2)[0] == texts[1]  # sample i draws from seed + i


def test_sampling_follows_the_distribution() -> None:
    import torch

    from qtool.runtimes.worker.transformers import pick

    probabilities = torch.tensor([0.1, 0.5, 0.3, 0.1])
    logits = probabilities.log().repeat(8000, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(len(logits))]

    def frequencies(temperature: float, top_p: float, **further: float) -> torch.Tensor:
        sampling = {"temperature": temperature, "top_p": top_p, **further}
        return pick(logits, sampling, generators).bincount(minlength=4) / len(logits)

    torch.testing.assert_close(frequencies(1.0, 1.0), probabilities, atol=0.03, rtol=0)
    squared = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(0.5, 1.0), squared, atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(1.0, 0.7), torch.tensor([0, 0.625, 0.375, 0]), atol=0.03, rtol=0)
    assert frequencies(1.0, 0.01).tolist() == [0, 1, 0, 0]
    assert frequencies(0.0, 1.0).tolist() == [0, 1, 0, 0]
    two = torch.tensor([0, 0.625, 0.375, 0])
    torch.testing.assert_close(frequencies(1.0, 1.0, top_k=2), two, atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(1.0, 1.0, min_p=0.5), two, atol=0.03, rtol=0)
    assert frequencies(1.0, 0.6, top_k=2).tolist() == [0, 1, 0, 0]  # top_p counts after top_k: 0.625 is enough


def test_the_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    from qtool.runtimes.worker.transformers import penalize

    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    seen = [[3, 7, 3], [0, 49, 20]]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(seen), logits)
    torch.testing.assert_close(penalize(logits, seen, 1.3), expected)


@pytest.fixture
def changed(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_a_text_ends_at_any_of_the_models_end_tokens(changed: Path, answers: Answers) -> None:
    expected = answers("transformers", "float")[0]["token_ids"]
    step = next(i for i, token in enumerate(expected) if i and token not in expected[:i])
    file = changed / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [1, expected[step]]}))
    (answer,) = runtimes.generate(changed, PROMPTS[:1], max_tokens=MAX_TOKENS, runtime="transformers")
    assert (answer["token_ids"], answer["finish_reason"]) == (expected[: step + 1], "stop")


def test_the_context_bounds_prompts_and_answers(tiny_llama: Path) -> None:
    events: list[dict[str, Any]] = []

    def ask(length: int) -> list[dict[str, Any]]:
        prompts = [[5] * length]
        settings: dict[str, Any] = {"max_tokens": 9, "runtime": "transformers", "ignore_eos": True}
        return runtimes.generate(tiny_llama, prompts, on_event=events.append, **settings)

    (answer,) = ask(508)
    assert (answer["completion_tokens"], answer["finish_reason"]) == (4, "length")
    assert [e["message"] for e in events if e["event"] == "warning"] == [
        "1 of 1 answers may end early: the model takes 512 tokens in total"
    ]
    with pytest.raises(InputError, match="512 tokens; the model takes 512"):
        ask(512)


def test_nan_is_an_error(changed: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QtoolError, match="computes NaN"):
        runtimes.generate(changed, PROMPTS, max_tokens=2, runtime="transformers")


def test_no_tokenizer(changed: Path) -> None:
    for file in changed.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no usable tokenizer") as caught:
        runtimes.generate(changed, PROMPTS, max_tokens=2, runtime="transformers")
    assert caught.value.where == str(changed)


def test_code_of_the_models_own_runs_only_when_trusted(changed: Path) -> None:
    config = json.loads((changed / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (changed / "config.json").write_text(json.dumps(config))
    (changed / "own.py").write_text(f"open({str(changed / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError) as caught:
        runtimes.generate(changed, PROMPTS, max_tokens=2, runtime="transformers")
    assert "--trust-remote-code" in (caught.value.hint or "")
    assert not (changed / "ran").exists()


def test_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.environments import lookup

    installed = {"vllm", "transformers"}
    monkeypatch.setenv("QTOOL_ENVIRONMENTS", "/no/such/folder")
    monkeypatch.setattr(lookup, "available", lambda package: package in installed)
    assert runtimes.choose("auto", "float").name == "vllm"
    assert runtimes.choose("auto", "compressed-tensors").runtime.worker == "qtool.runtimes.worker.vllm"
    assert runtimes.choose("transformers", "float").runtime.worker == "qtool.runtimes.worker.transformers"
    with pytest.raises(InputError, match="unknown runtime 'mlx'"):
        runtimes.choose("mlx", "float")
    for format, plugin in (("golden-stick", "vllm-mindspore"), ("modelslim", "vllm-ascend")):
        with pytest.raises(InputError, match=plugin):
            runtimes.choose("auto", format)
        with pytest.raises(InputError, match="transformers can't read"):
            runtimes.choose("transformers", format)
    installed |= {"vllm_mindspore", "vllm_ascend"}
    assert runtimes.choose("auto", "golden-stick").engine["quantization"] == "golden-stick"
    assert runtimes.choose("vllm", "modelslim").engine["quantization"] == "ascend"
    assert runtimes.choose("vllm-mindspore", "golden-stick") == runtimes.choose("auto", "golden-stick")
    assert runtimes.choose("vllm-mindspore", "float").name == "vllm-mindspore"
    assert "quantization" not in runtimes.choose("vllm-ascend", "float").engine
    for runtime, format in (("vllm-mindspore", "compressed-tensors"), ("vllm-ascend", "golden-stick")):
        with pytest.raises(InputError, match=f"{runtime} can't read {format}"):
            runtimes.choose(runtime, format)
    installed -= {"vllm"}
    assert runtimes.choose("auto", "float").name == "transformers"
    with pytest.raises(InputError, match="vllm needs the Python package vllm") as caught:
        runtimes.choose("vllm", "float")
    assert "qtool env install vllm" in (caught.value.hint or "")


def test_a_users_environment_wins_over_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    env = runtimes.choose("vllm", "float").env
    assert "OMP_NUM_THREADS" not in env
    if "VLLM_CPU_OMP_THREADS_BIND" in env:  # a machine without accelerators
        assert env["OMP_WAIT_POLICY"] == "PASSIVE"
