"""Digests of what `qtool quantize` writes, to compare before and after a change that must not change a byte.

    python -m tests.fingerprint OUT.json [--compare OLD.json] [--only PATTERN] [--model MODEL] [--again]

Tiny models of many families, times the schemes of the recipe that matches each, times the formats. They lie beside OUT
in fingerprint-models and are made once: both runs need the same ones, and so the same folder for OUT or a copy of them.
Cases that OUT has already are skipped, as long as the code is the same. Of qtool only the command line is used, from
the repository that this file is in. The last bits depend on the processor and on the versions of Python, torch and
transformers, so OUT names them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMES = ("w8a8", "w8a8-dynamic", "w8a8-static")  # where a recipe has no such scheme, the refusal is the fingerprint
FORMATS = ("compressed-tensors", "golden-stick", "modelslim")
THREADS = 2  # the last bits depend on it
SIZE = ("--samples", "4", "--seq-len", "64")
MAX_SECONDS = 1800

# model_type -> what its config.json has beside _DENSE.
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},  # biases on q, k and v
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 8},
    "phi3": {"sliding_window": 8},  # q, k, v in one matrix, gate and up in another
}
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe")
_DENSE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,
}
# Recipes of a user's own, as JSON, which is YAML too.
RECIPES: dict[str, dict[str, Any]] = {
    "exact": {"extends": "default", "osl": "exact"},
    "choices": {
        "schemes": {
            "w8a8": [
                {"layers": ".*lm_head", "quantize": False},
                {
                    "layers": r".*\.self_attn\..*",
                    "activations": {"mode": "static", "observer": "mse"},
                    "smoothing": "smoothquant",
                    "smoothquant_alpha": 0.6,
                    "rounding": "nearest",
                },
                {
                    "layers": r".*\.mlp\..*",
                    "activations": {"mode": "static", "observer": "percentile", "percentile": 99.9},
                    "smoothing": "none",
                    "clip": False,
                },
            ]
        },
    },
}


@dataclass(frozen=True)
class Case:
    """One call of `qtool quantize`: a model's folder and options, but for those that all have."""

    name: str
    model: Path
    options: tuple[str, ...]


def cases(models: Path, real: Path | None) -> Iterator[Case]:
    """All cases, in order.

    Args:
        models: where the tiny models and the other inputs lie, or will.
        real: a model of the user's own.
    """
    text = ("--calibration", str(models / "calibration.txt"))
    for name in (*DENSE, *EXPERTS):
        for scheme in SCHEMES:
            for form in FORMATS:
                options = ("--scheme", scheme, "--format", form, *text)
                yield Case(f"{name}/{scheme}/{form}", models / name, options)
    for name in RECIPES:
        recipe = ("--recipe", str(models / f"{name}.yaml"))
        yield Case(f"llama/recipe-{name}", models / "llama", (*recipe, "--scheme", "w8a8", *text))
    for name in ("llama", "qwen3_moe"):
        yield Case(f"{name}/workers", models / name, ("--scheme", "w8a8", "--workers", "2", *text))
    builtin = ("--scheme", "w8a8", "--calibration", "builtin")
    yield Case("llama/calibration-builtin", models / "llama", builtin)
    if real is not None:
        for scheme in SCHEMES[:2]:
            yield Case(f"{real.name}/{scheme}", real, ("--scheme", scheme, *text))


def make_inputs(models: Path) -> None:
    """Make what is missing of the tiny models, the recipes and the calibration text."""
    from pydoc_data.topics import topics

    models.mkdir(parents=True, exist_ok=True)
    text = "\n".join(topics[name] for name in sorted(topics))
    _make(models / "calibration.txt", partial(Path.write_text, data=text))
    for name, recipe in RECIPES.items():
        content = json.dumps({"name": name, "description": name, **recipe})
        _make(models / f"{name}.yaml", partial(Path.write_text, data=content))
    if all((models / name).exists() for name in (*DENSE, *EXPERTS)):
        return
    from tests import families

    tokenizer = families.train_tokenizer(512)
    for name, config in DENSE.items():
        _make(models / name, partial(_dense, model_type=name, tokenizer=tokenizer, config=config))
    for name in EXPERTS:
        if name != "deepseek_v3":
            _make(models / name, partial(families.make, model_type=name, tokenizer=tokenizer, shards=2))
    plain = models / "deepseek_v3-bfloat16"
    _make(plain, partial(families.make, model_type="deepseek_v3", tokenizer=tokenizer))
    _make(models / "deepseek_v3", partial(families.to_fp8, plain, shards=2))


def _make(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not at all."""
    if path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write(Path(folder) / path.name)
        (Path(folder) / path.name).rename(path)


def _dense(folder: Path, model_type: str, tokenizer: Any, config: dict[str, Any]) -> None:
    """A random bfloat16 model with a few loud channels, so that smoothing and static ranges have something to do."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    made = AutoConfig.for_model(model_type, **(_DENSE | tokens | {"vocab_size": len(tokenizer)} | config))
    made.dtype = torch.bfloat16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    loud = torch.randperm(made.hidden_size)[:3]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, loud] *= 6
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(0.6 + 0.8 * torch.rand(parameter.shape))
                parameter[loud] *= 5
            elif name.endswith(".bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape))
            elif name.endswith(("up_proj.weight", "v_proj.weight", "qkv_proj.weight")):
                parameter[torch.randperm(parameter.shape[0])[:3]] *= 8
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fingerprint(case: Case, scratch: Path) -> dict[str, Any]:
    """What the case gives: `files`, a digest by name; or `refused`, the first line of the message; or `failed`."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        home, output = Path(folder) / "home", Path(folder) / "output"
        settings = ("--engine", "native", "--device", "cpu", "--threads", str(THREADS), *SIZE, "--seed", "0", "--quiet")
        command = ("-m", "qtool", "quantize", str(case.model), "--output", str(output), *settings, *case.options)
        env = {
            **os.environ,
            **{f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("STATE", "CACHE", "CONFIG", "DATA")},
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUTF8": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
            "TERM": "dumb",
            "OMP_NUM_THREADS": str(THREADS),
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [sys.executable, *command], env=env, timeout=MAX_SECONDS, capture_output=True, encoding="utf-8"
        )
        said = done.stderr.replace(folder, "…").replace(str(case.model.parent), "…")
        if done.returncode == 2:
            return {"refused": next(line for line in said.splitlines() if line)}
        if done.returncode != 0:
            return {"failed": f"exit code {done.returncode}: {said}"}
        return {"files": digests(output)}


def digests(folder: Path) -> dict[str, str]:
    """Of the tensors of each *.safetensors, the quantization_config of config.json, descriptions and indices."""
    found = {file.name: tensors_digest(file) for file in sorted(folder.glob("*.safetensors"))}
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "config.json":
            found["config.json: quantization_config"] = _digest([_canonical(content.get("quantization_config"))])
        elif file.name.endswith(("_description.json", ".index.json")):
            found[file.name] = _digest([_canonical(content)])
    return found


def tensors_digest(file: Path) -> str:
    """SHA-256 over each tensor's name, dtype, shape and bytes, in the order of the names, wherever they lie."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)

        def parts() -> Iterator[bytes]:
            for name, about in sorted(header.items()):
                begin, end = about["data_offsets"]
                yield _canonical([name, about["dtype"], about["shape"]])
                stream.seek(8 + length + begin)
                yield stream.read(end - begin)

        return _digest(parts())


def folder_digest(folder: Path, suffixes: tuple[str, ...] = ("",)) -> str:
    """Of the names and bytes of all files under a folder whose names end so."""

    def parts() -> Iterator[bytes]:
        for file in sorted(path for path in folder.rglob("*") if path.name.endswith(suffixes) and path.is_file()):
            yield _canonical([str(file.relative_to(folder)), file.stat().st_size])
            yield file.read_bytes()

    return _digest(parts())


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """What the last bits depend on besides the code."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", info.read_text(), re.M) if info.exists() else None
    return {
        "processor": f"{platform.machine()} {_digest([flags[1].encode()])[:8] if flags else ''}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """One line for each case of `old` that `new` lacks or that came out differently."""
    for name, before in old.items():
        after = new.get(name)
        if after is None:
            yield f"{name}: missing"
        elif before["input"] != after["input"]:
            yield f"{name}: the model or the recipe is another one, so nothing can be said"
        elif "files" in before and "files" in after:
            names = {**before["files"], **after["files"]}
            if changed := [file for file in names if before["files"].get(file) != after["files"].get(file)]:
                yield f"{name}: differs in {', '.join(changed)}"
        elif before != after:
            yield f"{name}: was {_outcome(before)}, is {_outcome(after)}"


def _outcome(result: dict[str, Any]) -> str:
    if "files" in result:
        return " ".join(digest[:8] for digest in result["files"].values())
    return next(f"{key}: {result[key]}" for key in ("refused", "failed") if key in result)


def _load(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _save(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="exit with 1 if a case differs or is missing")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression found in the case's name")
    parser.add_argument("--model", type=Path, help="a real model besides the tiny ones: its folder")
    parser.add_argument("--again", action="store_true", help="also the cases that OUT.json has already")
    args = parser.parse_args()
    out, real = args.out.absolute(), args.model and args.model.absolute()
    models = out.parent / "fingerprint-models"
    make_inputs(models)
    code = _digest(folder_digest(REPOSITORY / part, (".py", ".yaml")).encode() for part in ("qtool", "recipes"))
    about = {**environment(), "code": code}
    content = _load(out) if out.exists() else {"about": about, "cases": {}}
    if content["about"] != about:
        print(f"{out.name} is of other code or another environment: all its cases are made again", flush=True)
        content = {"about": about, "cases": {}}
    done: dict[str, Any] = content["cases"]
    inputs: dict[Path, str] = {}
    for case in cases(models, real):
        if not re.search(args.only, case.name) or (case.name in done and not args.again):
            continue
        if case.model not in inputs:
            inputs[case.model] = folder_digest(case.model)
        texts = [_digest([Path(value).read_bytes()]) for value in case.options if value.startswith(str(models))]
        began = time.monotonic()
        result = fingerprint(case, out.parent)
        done[case.name] = {"input": _digest(text.encode() for text in (inputs[case.model], *texts)), **result}
        _save(out, content)
        print(f"{case.name} {time.monotonic() - began:.0f} s: {_outcome(result)}", flush=True)
    failed = any("failed" in result for name, result in done.items() if re.search(args.only, name))
    if args.compare is None:
        return int(failed)
    old = _load(args.compare)
    for key, value in environment().items():
        if old["about"][key] != value:
            print(f"another {key}: {old['about'][key]} before, {value} now")
    wanted = {name: result for name, result in old["cases"].items() if re.search(args.only, name)}
    found = list(differences(wanted, done))
    print("\n".join([*found, f"{len(wanted) - len(found)} of {len(wanted)} cases are the same"]))
    return int(failed or bool(found) or not wanted)


if __name__ == "__main__":
    sys.exit(main())
