"""Decoders whose layers aren't called with hidden states alone, one layer at a time, against transformers whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.model.decoder import DecoderStream
from qtool.model.state import Batch
from qtool.model.statefile import StateFile
from tests.zoo import models

# kind, type, and whether hidden states are all that passes between layers
KINDS = [
    ("text", "opt", True),  # learned positions before the layers
    ("text", "falcon", True),  # layers that return a tuple
    ("text", "bloom", False),  # a bias of attention with the samples in it, a norm on embeddings
    ("text", "glm_moe_dsa", False),  # places that one layer chooses for the next ones
    ("text", "gemma3n_text", False),  # several streams, inputs per layer and token, shared keys and values
    ("text", "gemma4_text", False),
    ("text", "deepseek_v4", False),  # several streams, token ids that choose experts
    ("text", "zamba2", False),  # a block that several layers share, and embeddings for each
    ("image", "mllama", True),  # layers that only pictures use
    ("image", "qwen2_5_vl", True),
]


@torch.no_grad()
def streamed(folder: Path, ids: torch.Tensor, states: Path) -> tuple[DecoderStream, torch.Tensor]:
    """Logits [tokens, vocabulary], through files as the engine does."""
    stream = DecoderStream(Checkpoint.open(folder), dtype=torch.float32)
    batch = stream.prologue(ids)
    for index in range(stream.depth):
        file = StateFile(states / f"{index}", len(ids), stream.entering(index, ids.shape[1]))
        file.write(0, batch.state)
        with stream.layer(index) as layer:
            parts = [Batch(ids[i : i + 2], file.read(i, min(i + 2, len(ids)))) for i in range(0, len(ids), 2)]
            batch = Batch.cat([stream.run(index, layer, part) for part in parts])
        file.close()
    hidden = stream.head.leaving(batch).flatten(0, 1)
    return stream, stream.head.logits(hidden, stream.head.rows(0, stream.head.vocabulary))


@pytest.mark.parametrize(("kind", "model_type", "plain"), KINDS)
def test_logits_are_those_of_the_whole_model(kind: str, model_type: str, plain: bool, tmp_path: Path) -> None:
    folder = models.make(kind, model_type, tmp_path / "model")
    model = models.auto_class(kind).from_pretrained(folder, dtype=torch.float32).eval()
    ids = models.text(model, 3, 24, seed=0)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    stream, found = streamed(folder, ids, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert stream.is_plain == plain


@pytest.mark.parametrize(
    ("model_type", "sign"),
    [("xlm", "needs more than the last one leaves"), ("hrm_text", "each of them once and in order")],
)
def test_what_cant_be_run_layer_by_layer_is_refused(model_type: str, sign: str, tmp_path: Path) -> None:
    stream = DecoderStream(Checkpoint.open(models.make("text", model_type, tmp_path / "model")), dtype=torch.float32)
    with pytest.raises(InputError, match=f"one by one: .*{sign}"):
        stream.prologue(torch.arange(8)[None])


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("samples", [3, 11])
def test_states_come_back_from_a_file(samples: int, threads: bool, tmp_path: Path) -> None:
    state = (
        torch.randn(samples, 2, 5),
        torch.arange(4 * samples).reshape(samples, 4),
        torch.randn(samples, 7).bfloat16(),
    )
    layout = [(tuple(t.shape[1:]), t.dtype) for t in state]
    file = StateFile(tmp_path / "state", samples, layout, threads=threads)
    file.write(1, tuple(tensor[1:] for tensor in state))
    file.write(0, tuple(tensor[:1] for tensor in state))
    for found, wanted in zip(file.read(0, samples), state, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(file.read(2, 3)[1], state[1][2:3])
    places = [slice(0, 2), slice(2, samples)]
    for place, read in zip(places, file.reads(places), strict=True):
        assert torch.equal(read[2], state[2][place])
    file.flush()
    assert file.path.stat().st_size == sum(tensor.nbytes for tensor in state)
    with pytest.raises(ValueError, match="per sample"):
        file.write(0, (state[0][:, :1], *state[1:]))
    file.close()
