"""Quantizes one model and judges the result without qtool: by its files, by transformers, by plain rounding."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.zoo import configs, models
from tests.zoo.fused import together

RIGHT, REFUSED, ERROR, HOLLOW, ABSENT = "right", "refused", "raw error", "hollow", "not made"
LEAST_SHARE = 0.9  # of the decoder's linear weights
MOST_ERROR = 1.3  # times plain rounding's
_ROUTER = re.compile(r"(^|\.)(router|gate|gate\.wg|shared_expert_gate|router\..*|gate\.weight)$")


@dataclass
class Verdict:
    """How a type came out.

    Attributes:
        kind, model_type: of the type.
        result: one of the words above.
        reason: of anything but `RIGHT`.
        share: of the decoder's linear weights, how much is int8.
        ratio: mean squared error of the logits over plain rounding's, square root.
        floats: what qtool said stays float.
    """

    kind: str
    model_type: str
    result: str = ERROR
    reason: str = ""
    share: float = 0.0
    ratio: float | None = None
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Quiet:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def progress(self, *_: Any, **__: Any) -> None: ...

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def judge(kind: str, model_type: str, folder: Path) -> Verdict:
    """Make a model of the type in the folder, quantize it, look at what came out."""
    from qtool.errors import QtoolError

    verdict = Verdict(kind, model_type)
    try:
        source = models.make(kind, model_type, folder / "float")
        model, verdict.reason = load(kind, source), ""
        calibration, ids = models.text(model, 8, 48, seed=1), models.text(model, 4, 48, seed=2)
        logits = _logits(model, ids)
    except Exception as error:
        verdict.result, verdict.reason = ABSENT, _short(error)
        return verdict
    verdict.reason = ""
    try:
        said = quantize(source, folder / "int8", calibration)
    except QtoolError as error:
        verdict.result, verdict.reason = REFUSED, " ".join(str(error).split())[:400]
        return verdict
    except Exception as error:
        verdict.reason = _short(error)
        return verdict
    verdict.warnings = said
    try:
        faults = _faults(verdict, model, source, folder, ids, logits)
    except Exception as error:
        faults = [f"the result can't be judged: {_short(error)}"]
    verdict.result, verdict.reason = (HOLLOW, "; ".join(faults)) if faults else (RIGHT, "")
    return verdict


def quantize(source: Path, target: Path, calibration: torch.Tensor) -> list[str]:
    """W8A8 with dynamic activations, by the recipe that qtool would choose, in this process; gives the warnings."""
    from qtool.engines.job import CalibrationText, CalibrationTokens, OutputFolder, QuantizationJob
    from qtool.engines.native.execute import execute
    from qtool.engines.native.prepare import prepare
    from qtool.recipe import load

    report: Any = _Quiet()
    tokens = CalibrationTokens(calibration.tolist(), sha256(calibration.numpy().tobytes()).hexdigest(), "zoo")
    config = json.loads((source / "config.json").read_text())
    job = QuantizationJob(
        model=source,
        output=OutputFolder(target, "compressed-tensors"),
        recipe=load.match(config)[0],
        scheme="w8a8-dynamic",
        calibration=CalibrationText("zoo", len(calibration), calibration.shape[1], tokens=tokens),
        device="cpu",
    )
    execute(prepare(job, report), report)
    return [*report.warnings]


def _faults(
    verdict: Verdict, model: Any, source: Path, folder: Path, ids: torch.Tensor, logits: torch.Tensor
) -> list[str]:
    faults = []
    before, after = _tensors(source), _tensors(folder / "int8")
    quantized = {name for name, tensor in after.items() if tensor.dtype == torch.int8 and f"{name}_scale" in after}
    routers = [name for name in quantized if _ROUTER.search(name.removesuffix(".weight"))]
    if routers:
        faults.append(f"routers are int8: {_some(routers)}")
    verdict.share = sum(after[name].numel() for name in quantized) / decoder_weights(model)
    named = json.loads((folder / "int8" / "qtool.json").read_text()).get("left_float", [])
    if verdict.share + (sum(each["share"] for each in named) if verdict.warnings else 0) < LEAST_SHARE:
        faults.append(f"only {verdict.share:.0%} of the decoder's linear weights are int8")
    restored = {name: tensor for name, tensor in after.items() if name.removesuffix("_scale") not in quantized}
    conv1d = _conv1d(model)
    for name in quantized:
        number, scale = after[name].float(), after[f"{name}_scale"].float()
        restored[name] = number * (scale.t() if name in conv1d else scale)
    missing = {name: before[name] for name in before.keys() - restored.keys()}
    apart = {name: restored[name] for name in restored.keys() - before.keys()}
    again = together(missing, apart, interleaved=model.config.model_type in configs.INTERLEAVED)
    restored = {name: tensor for name, tensor in restored.items() if name not in again.used} | again.tensors
    if lost := before.keys() - restored.keys():
        faults.append(f"tensors are lost: {_some(lost)}")
    if strange := restored.keys() - before.keys():
        faults.append(f"strange tensors: {_some(strange)}")
    if lost or strange:
        return faults
    rounded = {name for name in quantized if name in before}
    nearest = {name: _nearest(before[name].float()) for name in rounded - conv1d}
    nearest |= {name: _nearest(before[name].float().t()).t() for name in rounded & conv1d}
    plain = before | nearest | again.plain
    quantized = rounded | again.plain.keys()
    errors = []
    for name, tensors in (("restored", restored), ("plain", plain)):
        _write(source, folder / name, tensors)
        own = load(verdict.kind, folder / name)
        verdict.reason = own.missing
        storages = _quantized_parameters(own, quantized)
        with _per_token(storages):
            errors.append(float((_logits(own, ids) - logits).square().mean().sqrt()))
    if verdict.reason:
        faults.append(verdict.reason)
    verdict.ratio = round(errors[0] / max(errors[1], 1e-9), 3)
    if not verdict.ratio <= MOST_ERROR:
        faults.append(f"the logits' error is {verdict.ratio:.2f} times plain rounding's")
    return faults


def decoder_weights(model: Any) -> int:
    """Numbers in the weights of linears and fused experts inside the decoder layers."""
    total, seen = 0, set[int]()  # a tied parameter counts once
    for layers in _layer_lists(model):
        for name, module in layers.named_modules():
            for part, parameter in module.named_parameters(recurse=False):
                linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
                fused = (
                    parameter.dim() == 3
                    and not re.search(r"conv|x_proj|dt_proj", part)
                    and not isinstance(module, nn.modules.conv._ConvNd)
                )
                matrix = (parameter.dim() == 2 and linear) or (fused and min(parameter.shape[1:]) >= 16)
                if matrix and id(parameter) not in seen and not _ROUTER.search(f"{name}"):
                    seen.add(id(parameter))
                    total += parameter.numel()
    assert total, "no linears are found in the decoder"
    return total


def _conv1d(model: Any) -> set[str]:
    """The weights that are [in, out]."""
    return {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}


def _layer_lists(model: Any) -> list[nn.ModuleList]:
    """The lists of modules of the text decoder."""
    try:
        decoder = model.get_decoder()
    except Exception:
        decoder = model
    if not any(isinstance(m, nn.ModuleList) for m in decoder.modules()):
        decoder = model
    lists = [(name, m) for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    tower = re.compile(r"altup|vision|visual|audio|image|vq|tower|encoder\.layer(?!.*decoder)")
    own = [(n, m) for n, m in lists if not tower.search(n) or "text" in n or model.config.model_type in _ENCODERS]
    lists = own or [(n, m) for n, m in lists if not re.search("vision|visual|image", n)]
    return [m for n, m in lists if not any(n != other and n.startswith(f"{other}.") for other, _ in lists)]


_ENCODERS = frozenset(name for name, changes in configs.SPECIAL.items() if changes.get("is_decoder"))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def _write(source: Path, target: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """The float model's folder with other numbers, each in its own type."""
    types = {name: tensor.dtype for name, tensor in _tensors(source).items()}
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    as_float = {n: t.to(torch.float32 if types[n].is_floating_point else types[n]) for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in as_float.items()}, target / "model.safetensors", metadata={"format": "pt"})


def load(kind: str, folder: Path) -> Any:
    """In float32; its attribute `missing` says what transformers misses or doesn't expect."""
    model, about = models.auto_class(kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {key: sorted(map(str, about[key])) for key in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    faults = [f"transformers: {key.replace('_', ' ')}: {_some(names)}" for key, names in wrong.items() if names]
    model.missing = "; ".join(faults)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    inputs = models.pictures(model.config.model_type, ids)
    if type(model).__name__.endswith("ForImageClassification"):
        model = model.model  # all logits, rather than those of yes and no after the last token
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **inputs).logits.float()
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite")
    return logits


def _nearest(weight: torch.Tensor) -> torch.Tensor:
    """Each row, of the last dimension, rounded to 255 steps over twice its largest magnitude."""
    scale = 2 * weight.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / 255
    return (weight / scale).round().clamp(-128, 127) * scale


def _quantized_parameters(model: Any, quantized: set[str]) -> set[int]:
    """Addresses of the parameters that quantized tensors went into, found by transformers' own way back."""
    from transformers.core_model_loading import revert_weight_conversion

    found = set()
    for name, parameter in model.named_parameters():
        try:
            stored = revert_weight_conversion(model, {name: parameter.data})
        except Exception:
            stored = {name: parameter.data}
        if any(key in quantized or key.removeprefix("model.") in quantized for key in stored):
            found.add(parameter.untyped_storage().data_ptr())
    return found


class _Rounded(TorchFunctionMode):
    """What is multiplied with a quantized weight goes through int8, with a scale per token."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()
        self._storages, self._inside = storages, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._inside and getattr(func, "__name__", "") in _PRODUCTS:
            self._inside = True
            try:
                args = self._change(func.__name__, list(args))
            finally:
                self._inside = False
        return func(*args, **kwargs)

    def _change(self, name: str, args: list[Any]) -> list[Any]:
        first = 1 if name in ("addmm", "baddbmm") else 0
        if len(args) > first + 1 and isinstance(args[first + 1], torch.Tensor) and self._is_quantized(args[first + 1]):
            args[first] = _per_row(args[first])
        return args

    def _is_quantized(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages


_PRODUCTS = ("linear", "matmul", "__matmul__", "bmm", "addmm", "mm", "baddbmm")


@contextmanager
def _per_token(storages: set[int]) -> Iterator[None]:
    with _Rounded(storages):
        yield


def _per_row(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({Path(place.filename).name}:{place.lineno})" if place else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
