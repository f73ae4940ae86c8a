"""The report's page: its figures are those of --json, it needs nothing but itself, and a real browser shows it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.reader import Checkpoint
from qtool.evaluation import facts, plots
from qtool.evaluation.report import FIGURES
from tests import browser


class Tables(HTMLParser):
    """The text of every cell of tables with an id; every attribute that names a resource; the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self._rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.sources += [str(value) for key, value in given.items() if key in ("src", "href", "srcset")]
        if tag == "table":
            self._rows = self.tables.setdefault(str(given["id"]), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self._rows[-1][-1] += data


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, run_qtool: Callable[..., Any]
) -> tuple[Path, dict[str, Any]]:
    """(the page, what --json printed)."""
    folder = tmp_path_factory.mktemp("report")
    done = run_qtool("quantize", tiny_llama, "--output", folder / "<b>&w8a8", "--samples", "4", "--seq-len", "64")
    assert done.code == 0, done.stderr
    page = folder / "report.html"
    small = ("--windows", "3", "--length", "64")
    done = run_qtool("eval", tiny_llama, folder / "<b>&w8a8", *small, "--report", page, "--json")
    assert done.code == 0, done.stderr
    return page, json.loads(done.stdout)


def test_its_figures_are_those_of_json(made: tuple[Path, dict[str, Any]]) -> None:
    page, result = made
    shown = Tables(page.read_text(encoding="utf-8")).tables["figures"]
    assert len(shown) == len(FIGURES)
    for row, (key, (name, _)) in zip(shown, FIGURES.items(), strict=True):
        scale = 100 if row[1].endswith("%") else 1
        numbers = [float(text) / scale for text in re.findall(r"\d+(?:\.\d+)?", " ".join(row[1:]))]
        expected = [result[key][part] for part in ("value", "low", "high") if result[key].get(part) is not None]
        assert row[0] == name
        assert numbers == pytest.approx(expected, abs=6e-4 if "perplexity" in key else 6e-5)


def test_so_are_the_numbers_behind_the_plots(made: tuple[Path, dict[str, Any]]) -> None:
    page, result = made
    tables = Tables(page.read_text(encoding="utf-8")).tables
    along = [float(row[1]) for row in tables["along"][1:]]
    assert along == pytest.approx(result["kl_along_text"]["values"], abs=1e-6)
    sizes = {row[0]: [float(cell) for cell in row[1:]] for row in tables["sizes"][1:]}
    for part, (base, quantized) in sizes.items():
        expected = [result["sizes"][model][part] / 1e6 for model in ("base", "quantized")]
        assert [base, quantized] == pytest.approx(expected, abs=0.06)
    assert len(tables["groups"]) == 1 + 8  # two layers of four groups
    for row, group in zip(tables["groups"][1:], result["groups"], strict=True):
        assert row[:3] == [group["layer"], ", ".join(group["linears"]), group["activations"]]
        assert float(row[3]) == pytest.approx(group["alpha"], abs=0.01)
        assert float(row[4]) == pytest.approx(group["relative_error"], rel=1e-3)
        for cell, key in ((row[5], "input"), (row[6], "smoothed")):
            assert [float(n) for n in cell.split(" to ")] == pytest.approx(
                [group[key]["low"], group[key]["high"]], rel=1e-3
            )


def test_it_is_one_file_without_scripts(made: tuple[Path, dict[str, Any]]) -> None:
    text = made[0].read_text(encoding="utf-8")
    found = Tables(text)
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert found.sources == []  # pictures stand in the page
    assert text.count("<svg") == 4
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"#0101[0-9a-f]{2}", text)  # every colour is the page's own
    assert "font-family" not in "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))  # and so is the font
    assert "prefers-color-scheme: dark" in text
    assert "<b>&w8a8" not in text  # a name is text, whatever it holds
    assert "&lt;b&gt;&amp;w8a8" in text
    assert len(text) < 1_000_000


def test_sizes_add_up(made: tuple[Path, dict[str, Any]], tiny_llama: Path) -> None:
    _, result = made
    for key, folder in (("base", tiny_llama), ("quantized", Path(result["quantized"]))):
        tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
        assert sum(result["sizes"][key].values()) == sum(tensor.nbytes for tensor in tensors)
    assert result["sizes"]["base"]["quantized weights"] == 0
    assert result["sizes"]["quantized"]["quantized weights"] == 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 160)


def test_bytes_are_of_what_the_tensors_are(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
        "model.layers.0.packed.weight_packed": torch.zeros(8, 2, dtype=torch.int32),
        "model.layers.0.packed.weight_scale": torch.zeros(8, 3, dtype=torch.bfloat16),
        "model.layers.0.gptq.qweight": torch.zeros(2, 8, dtype=torch.int32),
        "model.layers.0.gptq.qzeros": torch.zeros(5, 2, dtype=torch.int32),
        "model.layers.0.gptq.scales": torch.zeros(5, 7, dtype=torch.float16),
        "model.layers.0.fp8.weight": torch.zeros(8, 4).to(torch.float8_e4m3fn),
        "model.layers.0.fp8.weight_scale_inv": torch.zeros(1, 1),
        "model.layers.0.experts.gate_up_proj": torch.zeros(3, 4, 5, dtype=torch.bfloat16),
        "model.layers.0.experts.gate_up_proj_bias": torch.zeros(3, 5, dtype=torch.bfloat16),
        "model.layers.0.norm.weight": torch.zeros(8, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(8, 4, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert facts.sizes(Checkpoint.open(tmp_path)) == {
        "embeddings, output": 64 + 32,
        "float weights": 120,
        "quantized weights": 64 + 64 + 32,
        "scales, norms, biases": 48 + 40 + 70 + 4 + 30 + 16,
    }


def drawn(*models: tuple[int, float]) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Where each model's number stands in the plot of size and divergence, and the labels of the vertical axis."""
    of = [(f"m{i}", nbytes, {"value": kl, "low": kl * 0.9, "high": kl * 1.1}) for i, (nbytes, kl) in enumerate(models)]
    svg = ElementTree.fromstring(plots.size_and_kl(of).svg.replace("xlink:", ""))
    numbers, labels = {}, []
    for each in svg.iter("text"):
        if "font-weight" in each.attrib["style"]:
            numbers[str(each.text)] = (float(each.attrib["x"]), float(each.attrib["y"]))
        elif re.fullmatch(r"0\.\d+", str(each.text)):
            labels.append(str(each.text))
    return numbers, labels


def test_models_of_one_size_do_not_cover_each_other() -> None:
    numbers, labels = drawn((163_200_000, 0.0066), (163_200_000, 0.0058), (194_000_000, 0.0042), (163_200_000, 0.0066))
    assert list(numbers) == ["1", "2", "3", "4"]
    for (x, y), (other_x, other_y) in itertools.combinations(numbers.values(), 2):
        assert math.hypot(x - other_x, y - other_y) > 12, numbers
    assert numbers["3"][1] > numbers["2"][1] > numbers["1"][1]  # lower is nearer to the original
    assert "0.000" in labels


def test_what_is_far_apart_has_a_logarithmic_axis() -> None:
    numbers, labels = drawn((163_200_000, 0.004), (163_300_000, 0.008), (113_000_000, 0.128))
    assert "0.01" in labels
    assert "0.1" in labels
    (_, y4), (_, y8), (_, y128) = numbers.values()
    assert (y4 - y128) / (y4 - y8) == pytest.approx(5, rel=0.05)  # log2 of 32 and of 2


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, width: int
) -> None:
    """The page in a frame of a phone's width, and of a screen's, in a real browser that then says how wide it is."""
    if (program := browser.find()) is None:
        # nothing to drive: what the browser would measure is still pinned by the page's own rules
        assert "width=device-width" in made[0].read_text(encoding="utf-8")
        return
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{made[0].as_uri()}" style="width:{width}px;height:3000px;border:0"></iframe>'
        "<script>onload = () => { const d = f.contentDocument.documentElement;"
        "const drawn = [...f.contentDocument.querySelectorAll('svg')];"
        "const ok = drawn.every(i => i.getBoundingClientRect().width > 100);"
        "document.title = `${d.scrollWidth} ${ok} ${drawn.length}`; }</script>"
    )
    shown = browser.dom(program, frame, tmp_path / "profile")
    found = re.search(r"<title>(\d+) (\w+) (\d+)</title>", shown)
    assert found, shown[:2000]
    assert int(found[1]) <= width
    assert found[2] == "true"
    assert found[3] == "4"


def test_a_model_of_an_engine_that_measures_less(
    made: tuple[Path, dict[str, Any]], tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    """mindspore-gs tells no group's error, nor the ranges of its input."""
    quantized = tmp_path / "quantized"
    shutil.copytree(made[1]["quantized"], quantized)
    facts = json.loads((quantized / "qtool.json").read_text())
    for row in facts["layers"]:
        for key in ("relative_error", "input", "smoothed"):
            del row[key]
    (quantized / "qtool.json").write_text(json.dumps(facts))
    done = run_qtool("eval", tiny_llama, quantized, "--windows", "1", "--length", "16", "--report", tmp_path / "r.html")
    assert done.code == 0, done.stderr
    rows = Tables((tmp_path / "r.html").read_text()).tables["groups"][1:]
    assert [(row[0], row[4]) for row in rows] == [(group["layer"], "") for group in made[1]["groups"]]


def test_a_page_that_cant_be_written_costs_no_figures(
    made: tuple[Path, dict[str, Any]], tiny_llama: Path, qtool_environment: dict[str, str], tmp_path: Path
) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    arguments = [
        "eval",
        tiny_llama,
        made[1]["quantized"],
        "--windows",
        1,
        "--length",
        16,
        "--report",
        "r.html",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"{limit}\nfrom qtool.__main__ import main\nmain()", *map(str, arguments)],
        env=qtool_environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert "at: r.html" in done.stderr
    assert json.loads(done.stdout)["kl_divergence"]["value"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("there.html", "exists already"), ("no/folder/r.html", "no such folder"), ("", "exists already")],
)
def test_a_page_that_cant_be_made_is_refused_at_once(
    tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "there.html").write_text("mine")
    done = run_qtool("eval", tiny_llama, tiny_llama, "--report", tmp_path / name)
    assert done.code == 2
    assert message in done.stderr
    assert (tmp_path / "there.html").read_text() == "mine"
