"""Which tokens an expert gets, which ones its statistics borrow, and where activations lie meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qtool.errors import QtoolError
from qtool.model.activations import Activations
from qtool.model.experts import Expert, Routing, run_all
from qtool.model.recorder import Recorder

TOKENS, EXPERTS, TOP, WIDTH = 60, 7, 3, 16


def random_routing() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(TOKENS, EXPERTS - 1, generator=generator)  # the last expert gets nothing
    weights, chosen = scores.topk(TOP)
    return chosen, weights


def test_routing_is_that_of_a_loop_over_tokens() -> None:
    chosen, weights = random_routing()
    routing = Routing(chosen, weights, EXPERTS)
    counts = []
    for expert in range(EXPERTS):
        found = [(t, float(weights[t, k])) for t in range(TOKENS) for k in range(TOP) if chosen[t, k] == expert]
        tokens, own = routing.tokens(expert)
        assert list(zip(tokens.tolist(), own.tolist(), strict=True)) == found
        counts.append(len(found))
    assert routing.counts(EXPERTS) == counts
    assert counts[-1] == 0
    assert sum(counts) == TOKENS * TOP


def test_all_experts_together_in_numpy() -> None:
    chosen, weights = random_routing()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    matrices = [[torch.randn(s, generator=generator) for s in ((5, WIDTH), (5, WIDTH), (WIDTH, 5))] for _ in range(7)]

    def gate(both: torch.Tensor) -> torch.Tensor:
        left, right = both.chunk(2, dim=-1)
        return left.relu() * right

    experts = ((number, Expert(g, u, d, gate)) for number, (g, u, d) in enumerate(matrices))
    found = run_all(experts, Routing(chosen, weights, EXPERTS), x).numpy()
    expected = np.zeros((TOKENS, WIDTH))
    for token in range(TOKENS):
        for k in range(TOP):
            g, u, d = (m.double().numpy() for m in matrices[int(chosen[token, k])])
            row = x[token].double().numpy()
            expected[token] += float(weights[token, k]) * (d @ (np.maximum(g @ row, 0) * (u @ row)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_short_experts_borrow_the_tokens_that_the_router_likes_next(tmp_path: Path) -> None:
    chosen, weights = random_routing()
    generator = torch.Generator().manual_seed(2)
    x, router = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(EXPERTS, WIDTH, generator=generator)
    with Recorder(tmp_path, TOKENS) as recorder:
        for part in (slice(0, 25), slice(25, TOKENS)):
            assert not recorder(x[part], chosen[part], weights[part]).any()
        routing = recorder.routing(EXPERTS)
        counts = routing.counts(EXPERTS)
        enough = max(counts) + 5
        extra = recorder.likely([0, 6], counts, routing, router, enough)
        spread = recorder.likely([6], counts, routing, None, 10)[6]
    for expert in (0, 6):
        own = {t for t in range(TOKENS) if expert in chosen[t]}
        rest = sorted(set(range(TOKENS)) - own, key=lambda t: -float(x[t] @ router[expert]))
        assert extra[expert].tolist() == sorted(rest[: enough - len(own)])
    assert len(set(spread.tolist())) == 10
    assert np.diff(spread).max() <= 15  # of 60 tokens, ten that leave no large gap


def test_activations_on_disk(tmp_path: Path) -> None:
    values = torch.randn(50, 6).to(torch.bfloat16)
    rows = torch.tensor([0, 1, 2, 7, 9, 10, 49])
    path = tmp_path / "a"
    with Activations(path, 50, 6, torch.bfloat16) as stored:
        assert not stored.read(0, 50).any()
        stored.write(0, values)
        assert torch.equal(stored.read(3, 20), values[3:20])
        assert torch.equal(stored.gather(rows), values[rows])
        stored.scatter(rows, torch.ones(7, 6, dtype=torch.bfloat16))
        values[rows] = 1
        assert torch.equal(stored.read(0, 50), values)
        again = Activations(path, 50, 6, torch.bfloat16, keep=True)
        assert torch.equal(again.read(0, 50), values)
        again.close()
        fresh = Activations(path, 50, 6, torch.bfloat16)
        assert not fresh.read(0, 50).any()
        fresh.close()
    assert not path.exists()


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with Activations(tmp_path / "a", 50, 6, torch.float32) as stored:
        os.close(stored._file)
        stored._file = os.open("/dev/full", os.O_RDWR)
        with pytest.raises(QtoolError, match="no space left: 240 bytes") as caught:
            stored.write(0, torch.ones(10, 6))
    assert caught.value.where == str(tmp_path / "a")
    assert "left behind" not in str(caught.value.hint)  # by then there may be work to resume


def test_a_file_size_limit(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from qtool.model.activations import Activations\n"
        "from qtool.errors import QtoolError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    Activations(Path(sys.argv[1]), 50, 6, torch.float32)\n"
        "except QtoolError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True)
    assert done.stdout.startswith(f"{tmp_path / 'a'}: no space left"), done.stderr
