"""`qtool eval --tasks`: a task whose answers are known, because the model itself gave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.evaluation.job import TasksJob, Vllm
from qtool.evaluation.tasks import metrics

TASK = """
task: pick
dataset_path: json
dataset_kwargs: {data_files: {test: pick.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Ten questions: in seven of them the right answer is the one that transformers finds the likelier, by far."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("data")
    (folder / "pick.yaml").write_text(TASK)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rows = []
    for i in range(10):
        question = f"The number {i} is called"
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        single = [(float(logits[ord_]), chr(65 + j)) for j in range(26) for ord_ in tokenizer(chr(65 + j))["input_ids"]]
        best, worst = max(single)[1], min(single)[1]
        rows.append({"question": question, "choices": [best, worst], "answer": 0 if i < 7 else 1})
    (folder / "pick.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_share_of_right_answers(tiny_llama: Path, data: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("eval", tiny_llama, "--tasks", "pick", "--data", data)
    if find_spec("lm_eval") is None:
        assert done.code == 2
        assert "pip install lm-eval" in done.stderr
        return
    assert done.code == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert result["tasks"]["pick"]["acc"]["value"] == pytest.approx(0.7)
    assert result["documents"]["pick"] == 10
    assert result["tasks"]["pick"]["acc"]["low"] == pytest.approx(0.3968, abs=1e-4)


@pytest.mark.parametrize(
    ("right", "low", "high"),  # as R's prop.test(right, 10, correct = FALSE) gives them
    [(7, 0.3967781, 0.8922087), (9, 0.5958500, 0.9821238), (10, 0.7224672, 1.0), (0, 0.0, 0.2775328)],
)
def test_intervals_of_shares(right: int, low: float, high: float) -> None:
    share = right / 10
    row = {"alias": "pick", "acc,none": share, "acc_stderr,none": (share * (1 - share) / 9) ** 0.5}
    found = metrics(row, 10)["acc"]
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=1e-6)


def test_a_job_through_the_pipe() -> None:
    vllm = Vllm("python", {"max_num_seqs": 4}, {"A": "1"})
    job = TasksJob(model=Path("/m"), tasks=["pick"], data=Path("/d"), vllm=vllm, limit=3, chat=True)
    assert TasksJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_intervals_of_other_figures() -> None:
    row = {"bleu,none": 31.5, "bleu_stderr,none": 0.5, "f1,none": 0.5, "f1_stderr,none": 0.25, "ppl,none": 9.0}
    found = metrics(row | {"ppl_stderr,none": "N/A"}, 10)
    assert [found["bleu"]["low"], found["bleu"]["high"]] == pytest.approx([30.52, 32.48])
    assert [found["f1"]["low"], found["f1"]["high"]] == pytest.approx([0.01, 0.99])
    assert found["ppl"] == {"value": 9.0, "low": None, "high": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "pick"), "--data"),
        (("--tasks", "pick", "--data", "{missing}"), "--data"),
        ((), "QUANTIZED"),
    ],
)
def test_bad_input(
    tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run_qtool("eval", tiny_llama, *(each.format(missing=tmp_path / "no") for each in arguments))
    assert done.code == 2
    assert message in done.stderr
