"""The YAML recipe, said once: every key, its type, its default and its meaning.

A recipe holds one or more named schemes; a scheme is an ordered list of policies; the first policy
whose `layers` regex matches the whole name of a linear layer decides how that layer is quantized.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _valid_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Regex = Annotated[str, AfterValidator(_valid_regex)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Activations(Strict):
    """How a linear's input is quantized: per token at run time, or per tensor with a range fixed in calibration."""

    mode: Literal["dynamic", "static"] = "dynamic"
    observer: Literal["minmax", "percentile", "mse"] = Field(
        default="minmax", description="static only: how the range is chosen from calibration"
    )
    percentile: float = Field(default=99.99, gt=50, le=100, description="for the percentile observer")


class Policy(Strict):
    """What happens to the linear layers whose full name matches `layers`."""

    layers: Regex
    quantize: bool = Field(default=True, description="false leaves the layer as it is")
    activations: Activations = Activations()
    smoothing: Literal["osl", "smoothquant", "none"] = "osl"
    smoothquant_alpha: float = Field(default=0.5, ge=0, le=1)
    clip: bool = Field(default=True, description="search a clipping ratio per output channel")
    rounding: Literal["nearest", "gptq"] = "gptq"


class Match(Strict):
    """Which models a recipe is for: the values of config.json keys. Lists mean any of them."""

    model_type: list[str] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict, description="further config.json keys and their values")


class Calibration(Strict):
    data: str = Field(default="builtin", description="builtin, self, or a .txt, .jsonl or .parquet file")
    samples: int = Field(default=32, gt=0)
    seq_len: int = Field(default=512, gt=1)
    seed: int = 0
    expert_tokens: int = Field(
        default=128,
        ge=1,
        description="tokens that a routed expert's statistics need; the router's next choices fill up to it",
    )


class Export(Strict):
    format: Literal["compressed-tensors", "golden-stick", "modelslim"] = "compressed-tensors"
    also: list[Literal["compressed-tensors", "golden-stick", "modelslim", "bfloat16"]] = Field(
        default_factory=list, description="further formats that `qtool run` converts the result to"
    )
    max_shard_gb: float = Field(default=4.0, gt=0, le=4.0)

    @model_validator(mode="after")
    def _also_others(self) -> Export:
        if self.format in self.also or len(set(self.also)) < len(self.also):
            raise ValueError(f"also: each format once, and not {self.format}, which is the format itself")
        return self


class Evaluation(Strict):
    """What `qtool run` compares the quantized model with its original on."""

    text: str = Field(default="builtin", description="builtin, or a .txt, .jsonl or .parquet file")
    windows: int = Field(default=24, ge=0, description="0 leaves the comparison out")
    length: int = Field(default=512, gt=1, description="tokens per window")


class Generate(Strict):
    """Defaults for `qtool generate`; names are vLLM's."""

    prompts: list[str] = Field(default_factory=list, description="what `qtool run` has the quantized model continue")
    max_tokens: int = Field(default=64, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    tensor_parallel_size: int = Field(default=1, gt=0, description="cards, for vLLM-MindSpore")
    distributed_executor: Literal["mp", "ray"] = Field(default="mp", description="ray where cards are in several hosts")


class Launch(Strict):
    """How the golden-stick engine runs a model that needs several cards (MindFormers, tensor parallel)."""

    devices: int = Field(default=1, gt=0, description="cards of one host")


class Repository(Strict):
    """Where the recipe's model can be downloaded from: `qtool download RECIPE`."""

    hub: Literal["huggingface", "modelers"]
    repo: str = Field(pattern=r"^[^/\s]+/[^/\s]+$", description="ORG/NAME")
    revision: str | None = Field(default=None, description="branch, tag or commit; the default branch without")


class Recipe(Strict):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str
    source: str | None = Field(default=None, description="whose published choice this follows, with a reference")
    model: Repository | None = Field(default=None, description="one model it is for, on a hub")
    match: Match = Match()
    osl: Literal["fast", "exact"] = Field(
        default="fast", description="exact repeats Golden Stick 1.4.1 step for step; fast searches better and cheaper"
    )
    default_scheme: str = "w8a8"
    schemes: dict[str, list[Policy]] = Field(min_length=1)
    calibration: Calibration = Calibration()
    launch: Launch = Launch()
    export: Export = Export()
    eval: Evaluation = Evaluation()
    generate: Generate = Generate()

    @model_validator(mode="after")
    def _default_scheme_exists(self) -> Recipe:
        if self.default_scheme not in self.schemes:
            raise ValueError(f"default_scheme {self.default_scheme!r} is not one of {', '.join(self.schemes)}")
        return self

    def policy(self, scheme: str, linear: str) -> Policy | None:
        """The first policy of `scheme` that matches the linear's whole name, or None (it stays float)."""
        for policy in self.schemes[scheme]:
            if re.fullmatch(policy.layers, linear):
                return policy if policy.quantize else None
        return None
