"""llama.cpp and vLLM on a CPU: tokens/s of one prompt, of 8 and of 64 together, and the time to the first token.

python -m tests.benchmarks.bench_llama --model FLOAT_DIR --quantized W8A8_DIR [--rounds N] [--scale X]

Files for llama.cpp are made first, all of the same float weights: ours by `qtool convert`, Q8_0 by llama.cpp's
converter, Q4_K_M by llama.cpp's rules (_llama_logits.py). Then rounds take turns. The first three rows are llama.cpp
alone (_llama_rate.py), the others `qtool generate` with either runtime. Rates are of a loaded model and count new
tokens, but prompts are read in that time too. The first token is that of `qtool generate --prompt` at a terminal, from
the start of the process, with the GGUF file in place.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks._common import DEFAULT_MODEL, REPOSITORY, model_or_exit, spread, table
from tests.benchmarks.bench_generate import prompt_file, rate
from tests.managed import managed_python

HERE = Path(__file__).parent
SIZES = {1: 96, 8: 48, 64: 32}  # prompts at a time (of 20 to 60 words), and tokens that each is answered with
RUNTIMES = {"llama-cpp": "qtool generate --runtime llama-cpp, W8A8", "vllm": "qtool generate --runtime vllm, W8A8"}


def made(model: Path, quantized: Path, python: str, folder: Path) -> dict[str, Path]:
    """The three GGUF files, by the names of their rows."""
    floats, ours, q8_0, q4_k_m = (folder / f"{name}.gguf" for name in ("float", "ours", "q8_0", "q4_k_m"))
    qtool = [sys.executable, "-m", "qtool", "convert"]
    for command in (
        [*qtool, model, "--to", "gguf", "--output", floats],
        [*qtool, quantized, "--to", "gguf", "--output", ours],
        [python, "-m", "convert_hf_to_gguf", model, "--outtype", "q8_0", "--outfile", q8_0],
        [python, HERE / "_llama_logits.py", "q4_k_m", floats, q4_k_m],
    ):
        done = subprocess.run([*map(str, command)], cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
    return {"W8A8 by qtool convert": ours, "Q8_0 by llama.cpp": q8_0, "Q4_K_M by llama.cpp's rules": q4_k_m}


def alone(file: Path, jobs: Path, python: str) -> list[float]:
    """llama.cpp's rates, in the order of SIZES."""
    command = [python, str(HERE / "_llama_rate.py"), str(file), str(jobs), str(len(os.sched_getaffinity(0)))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_token(quantized: Path, runtime: str) -> float:
    """Seconds until `qtool generate --prompt` shows the first of its text."""
    command = [sys.executable, "-m", "qtool", "generate", str(quantized), "--runtime", runtime, "--max-tokens", "8"]
    leader, follower = pty.openpty()
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--prompt", "Once upon a time"], stdin=subprocess.DEVNULL, stdout=follower, stderr=subprocess.PIPE
    )
    os.close(follower)
    seconds, text = 0.0, b""
    try:
        while piece := os.read(leader, 1 << 12):
            seconds = seconds or time.perf_counter() - begin
            text += piece
    except OSError:  # how a terminal ends whose program has gone
        pass
    os.close(leader)
    _, said = process.communicate()
    if process.returncode or not text.strip():
        sys.exit(said.decode()[-2000:])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--quantized", type=Path, default=REPOSITORY / "build" / "SmolLM2-W8A8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of tokens, to try it")
    args = parser.parse_args()
    model_or_exit(args.model)
    from transformers import AutoTokenizer

    os.environ |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    python = os.environ["QTOOL_LLAMA_CPP_PYTHON"] = managed_python("llama-cpp")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sizes = {count: max(4, int(tokens * args.scale)) for count, tokens in SIZES.items()}
    with tempfile.TemporaryDirectory() as base:
        folder, files = Path(base), made(args.model, args.quantized, python, Path(base))
        prompts = {count: prompt_file(folder, count) for count in sizes}
        ids = {count: tokenizer(file.read_text().splitlines())["input_ids"] for count, file in prompts.items()}
        jobs = folder / "jobs.json"
        jobs.write_text(json.dumps([{"prompts": ids[count], "tokens": tokens} for count, tokens in sizes.items()]))
        rates: dict[str, list[list[float]]] = {name: [] for name in (*files, *RUNTIMES.values())}
        waits: dict[str, list[float]] = {runtime: [] for runtime in RUNTIMES}
        first_token(args.quantized, "llama-cpp")  # makes the file that the others find
        for _ in range(args.rounds):
            for name, file in files.items():
                rates[name].append(alone(file, jobs, python))
            for runtime, name in RUNTIMES.items():
                given = (args.quantized, folder / "answers.jsonl", "--runtime", runtime)
                rates[name].append(
                    [rate(given[0], prompts[count], tokens, *given[1:]) for count, tokens in sizes.items()]
                )
                waits[runtime].append(first_token(args.quantized, runtime))
        bytes_of = {name: f"{file.stat().st_size / 1e6:.1f} MB" for name, file in files.items()}
    threads = len(os.sched_getaffinity(0))
    print(f"\ntokens/s, {threads} threads, greedy, {args.rounds} rounds: median (least to most)\n")
    columns = [f"{count} prompts to {tokens} tokens" for count, tokens in sizes.items()]
    rows = [[name, bytes_of.get(name, ""), *map(spread, zip(*found, strict=True))] for name, found in rates.items()]
    print(table(["", "file", *columns], rows))
    print("\nseconds from the start of `qtool generate --prompt` to the first text\n")
    print(table(["runtime", "seconds"], [[runtime, spread(found)] for runtime, found in waits.items()]))


if __name__ == "__main__":
    main()
