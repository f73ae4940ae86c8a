"""How long `qtool --help` and `qtool recipes list` take, as whole processes: best and median of 20."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds(*args: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "qtool", *args], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    for args in (("--help",), ("recipes", "list"), ("quantize", "--help")):
        seconds(*args)
        runs = [seconds(*args) for _ in range(20)]
        print(f"qtool {' '.join(args):16} best {min(runs):.3f} s  median {statistics.median(runs):.3f} s")


if __name__ == "__main__":
    main()
