"""What MindFormers 1.7.0 makes of experts of 4 bits: python mindformers_w4a8.py FOLDER OUT.npz

Prints a line of JSON as mindformers_reads does, and reads as that does. OUT has, of each grouped linear, `weight` as it
is in memory, int8 [experts, in, out / 2], `scale` uint64 [experts, groups, out], and `bias` float32 [experts, out],
which MindFormers makes of them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from mindformers_reads import read  # type: ignore[import-not-found]


def main(folder: str, output: str) -> None:
    found: dict[str, Any] = {}

    def look(model: Any) -> None:
        for name, cell in model.cells_and_names():
            if type(getattr(cell, "quant_method", None)).__name__ == "A8W4DynamicLinearMethod" and hasattr(
                cell, "gmm_bias"
            ):
                cell.quant_method.process_weights_after_loading(cell)
                found[f"{name}.weight"] = cell.weight.asnumpy()
                found[f"{name}.scale"] = cell.w_scale.asnumpy()
                found[f"{name}.bias"] = cell.gmm_bias.asnumpy()

    line = read(folder, look)
    np.savez(output, **found)
    print("\n" + json.dumps({"model": folder, **line}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
