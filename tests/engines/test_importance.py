"""effort: high. Its gradients against autograd on the whole model, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.checkpoint.reader import Checkpoint
from qtool.engines.native.importance import Backward, Importances
from qtool.engines.native.units import LayerLinears
from qtool.errors import InputError
from qtool.model.decoder import DecoderStream
from qtool.model.probe import probe
from tests import families
from tests.engines.conftest import Quiet


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    return families.make(folder, request.param, families.train_tokenizer(512), num_hidden_layers=2)


def importances(model: Path, ids: torch.Tensor, folder: Path) -> Importances:
    stream = DecoderStream(Checkpoint.open(model), dtype=torch.float32)
    found = Importances(folder)

    def linears(index: int, layer: torch.nn.Module) -> tuple[LayerLinears, bool]:
        probed = probe(stream, index, layer)
        return LayerLinears(probed.groups, {}, {}), probed.experts_are_added

    Backward(stream, ids, ids.numel(), linears, found, Quiet()).run()  # type: ignore[arg-type]
    return found


def test_squared_gradients_are_those_of_autograd(model: Path, tmp_path: Path) -> None:
    ids = torch.randint(4, 500, (3, 16), generator=torch.Generator().manual_seed(5))
    found = importances(model, ids, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"importance-0", "importance-1"}
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    outputs: dict[str, torch.Tensor] = {}
    for name, module in reference.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, _a, out, name=name: outputs.__setitem__(name, out))
    logits = reference(ids).logits.flatten(0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same tokens are drawn
        drawn = (logits - torch.empty_like(logits).exponential_().log_()).argmax(dim=1)
    log_p = logits.log_softmax(dim=1).gather(1, drawn[:, None]).sum()
    gradients = dict(zip(outputs, torch.autograd.grad(log_p, list(outputs.values())), strict=True))
    for index in range(2):
        groups = found.of(index)
        qkv = [gradients[f"{index}.self_attn.{name}_proj"].flatten(0, 1).square() for name in "qkv"]
        tokens, rows = (
            torch.stack([each.sum(dim=1) for each in qkv]).sum(dim=0),
            torch.cat([each.sum(dim=0) for each in qkv]),
        )
        for made, squares in ((groups["self_attn.q_proj"].tokens, tokens), (groups["self_attn.q_proj"].rows, rows)):
            torch.testing.assert_close(made, 0.9 * squares / squares.mean() + 0.1, rtol=2e-3, atol=1e-4)


def test_high_effort_is_recorded_and_changes_the_integers(
    model: Path, tmp_path: Path, quantize: Callable[..., dict[str, Any]]
) -> None:
    for effort in ("normal", "high"):
        quantize(model, tmp_path / effort, effort=effort)
        assert json.loads((tmp_path / effort / "qtool.json").read_text())["recipe"]["effort"] == effort
    name = "model.layers.0.self_attn.q_proj.weight"
    first, second = (Checkpoint.open(tmp_path / each).tensor(name) for each in ("normal", "high"))
    assert (first != second).any()
    assert first.shape == second.shape
    assert {path.name for path in tmp_path.iterdir()} == {"normal", "high"}


def test_exact_search_takes_no_effort(model: Path, tmp_path: Path, quantize: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="effort"):
        quantize(model, tmp_path / "out", osl="exact", effort="high")


def test_a_scheme_that_has_nothing_to_weigh_takes_no_effort(
    model: Path, tmp_path: Path, quantize: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(InputError, match="none of them") as found:
        quantize(model, tmp_path / "out", recipe="deepseek-v3", effort="high")
    assert "--recipe default" in (found.value.hint or "")
