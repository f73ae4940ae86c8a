"""What the engine's processes are told, and what they answer: typed at both ends, JSON in between.

The interpreter that has mindspore-gs has neither torch nor pydantic, so nothing here needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerPolicy:
    """What becomes of the linears whose whole names match a regex.

    Attributes:
        layers: the regex.
        quantize: False leaves them float; the rest then means nothing.
        per_token: the scale of their input is found at run time for each token; else it is one number.
        smoothing: osl, smoothquant or none.
        clip: search a clipping ratio for the weights.
    """

    layers: str
    quantize: bool
    per_token: bool
    smoothing: str
    clip: bool


@dataclass(frozen=True, kw_only=True)
class CardsLaunch:
    """How MindFormers is started on several cards.

    Attributes:
        yaml: its settings, as text.
        msrun: the command line.
    """

    yaml: str
    msrun: list[str]


@dataclass(frozen=True, kw_only=True)
class CalibrateTask:
    """What mindspore-gs does in one process, or in one for every card.

    Attributes:
        policies: the first that matches decides.
        ids: token ids, sample by sample.
        seed: of everything random.
        output: a folder to make.
        scratch: a folder for whatever the libraries drop in the current one.
        model: a folder that MindOne can load; with `launch` it is settings for MindFormers instead.
        device: auto, cpu or npu.
        launch: for several cards.
    """

    policies: list[LayerPolicy]
    ids: list[list[int]]
    seed: int
    output: str
    scratch: str
    model: str
    device: str = "npu"
    launch: CardsLaunch | None = None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CalibrateTask:
        policies = [LayerPolicy(**policy) for policy in content["policies"]]
        launch = content["launch"] and CardsLaunch(**content["launch"])
        return cls(**content | {"policies": policies, "launch": launch})


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What mindspore-gs did.

    Attributes:
        device: that it computed on.
        versions: of MindSpore and its packages.
        alphas: first linear of each OSL group to its alpha; empty where they can't be seen.
        peak_memory_bytes, seconds: of its process.
    """

    device: str
    versions: dict[str, str]
    alphas: dict[str, float]
    peak_memory_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ExportTask:
    """What mindspore-gs saved, to be made a checkpoint.

    Attributes:
        source, quantized: model folders, of the float model and of mindspore-gs.
        output: the folder to make.
        format: of the output.
        overwrite: replace the output.
        max_shard_gb: the largest file, in 10^9 bytes.
        schemes: linear to a preset's name, or None for float, as planned; None altogether for MindFormers' output,
            which is taken over as it is.
        report: qtool.json.
    """

    source: str
    quantized: str
    output: str
    format: str
    overwrite: bool
    max_shard_gb: float
    schemes: dict[str, str | None] | None
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The checkpoint: its folder, and the bytes of its tensors and of the float model's."""

    output: str
    output_bytes: int
    input_bytes: int
