"""Quantize a tiny model of every type that transformers has, and say how each came out.

python -m tests.zoo [--only REGEX] [--json OUT] [--docs] [--limit SECONDS]

--only matches "text:TYPE" or "image:TYPE". --docs writes docs/models.md, for which everything must run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from tests.zoo import table
from tests.zoo.judge import Verdict
from tests.zoo.keeper import run

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo")
    parser.add_argument("--only", default=".*", metavar="REGEX")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="for one type")
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    verdicts: list[Verdict] = []
    for verdict in run(re.compile(options.only), options.limit):
        verdicts.append(verdict)
        ratio = "" if verdict.ratio is None else f" error {verdict.ratio:.2f}"
        line = (
            f"{verdict.kind}:{verdict.model_type} {verdict.result} {verdict.share:.0%}{ratio} {verdict.seconds:.0f} s"
        )
        print(line, verdict.reason[:300], flush=True)
    for kind in ("text", "image"):
        counted = Counter(verdict.result for verdict in verdicts if verdict.kind == kind)
        print(f"{kind}: {sum(counted.values())} types; {dict(counted.most_common())}")
    if options.json:
        options.json.write_text(json.dumps([verdict.to_json() for verdict in verdicts], indent=1))
    if options.docs:
        DOCS.write_text(table.with_section(table.markdown(verdicts), DOCS.read_text()))


if __name__ == "__main__":
    main()
