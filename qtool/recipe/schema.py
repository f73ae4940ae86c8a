"""The YAML recipe, said once: every key, its type, its default and its meaning.

A recipe holds one or more named schemes; a scheme is an ordered list of policies; the first policy
whose `layers` regex matches the whole name of a linear layer decides how that layer is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from qtool import patterns
from qtool.checkpoint import formats
from qtool.recipe.policy import Policy
from qtool.recipe.strict import Strict
from qtool.recipe.words import FORM, FORMS, NAME, REPOSITORY
from qtool.scheme import CACHES, QuantizationArgs, named

_MODEL = "w8a8-dynamic"  # no layer of it is float or static because of what one runtime wants
NonEmpty = Annotated[str, Field(min_length=1)]
RepositoryName = Annotated[str, Field(pattern=REPOSITORY, json_schema_extra={FORM: FORMS[REPOSITORY]})]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]  # what generators of random numbers take


class Match(Strict):
    """Which models a recipe is for: the values of config.json keys. Lists mean any of them."""

    model_type: list[str] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict, description="further config.json keys and their values")


class Calibration(Strict):
    data: str = Field(default="builtin", description="builtin, self, or a .txt, .jsonl or .parquet file")
    samples: int = Field(default=32, gt=0)
    seq_len: int = Field(default=512, gt=1)
    seed: Seed = 0
    expert_tokens: int = Field(
        default=128,
        ge=1,
        description="tokens that a routed expert's statistics need; the router's next choices fill up to it",
    )


class Export(Strict):
    format: formats.Name = "compressed-tensors"
    also: list[formats.Target] = Field(
        default_factory=list, description="further formats that `qtool run` converts the result to"
    )
    max_shard_gb: float = Field(default=4.0, gt=0, le=4.0)

    @classmethod
    def disagreements(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        also, format = given.get("also"), given.get("format", cls.model_fields["format"].default)
        if isinstance(also, list) and (format in also or any(also.count(each) > 1 for each in also)):
            yield "also", f"each format once, and not {format}, which is the format itself"


class Evaluation(Strict):
    """What `qtool run` compares the quantized model with its original on."""

    text: str = Field(default="builtin", description="builtin, or a .txt, .jsonl or .parquet file")
    windows: int = Field(default=24, ge=0, description="0 leaves the comparison out")
    length: int = Field(default=512, gt=1, description="tokens per window")


class Sampling(Strict):
    """How the next token is chosen and when a text ends: vLLM's SamplingParams, by its names and in its ranges (0.32).

    None is not said: whoever has less to say decides, in the end vLLM's own default.
    """

    max_tokens: int | None = Field(default=None, gt=0, description="the most new tokens in an answer")
    min_tokens: int | None = Field(default=None, ge=0, description="the fewest new tokens in an answer")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="the temperature of sampling; 0 always takes the likeliest token"
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="sample from the likeliest tokens that together have this probability"
    )
    top_k: int | None = Field(
        default=None, ge=-1, description="sample from this many of the likeliest tokens; 0 or -1 means all"
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="leave out tokens less likely than this share of the likeliest one's probability",
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="above 1, tokens in the prompt or the answer become less likely"
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="above 0, tokens that the answer already has become less likely"
    )
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="above 0, tokens become less likely each time that the answer has them"
    )
    seed: Seed | None = None
    n: int | None = Field(default=None, gt=0, description="the number of answers per prompt")
    stop: list[NonEmpty] | None = Field(default=None, description="texts that end an answer; they are not part of it")
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = Field(default=None, description="keep the stop text in the answer")
    ignore_eos: bool | None = Field(default=None, description="continue after the token that ends the text")
    bad_words: list[NonEmpty] | None = Field(default=None, description="words that must not be in the answer")
    logit_bias: dict[int, float] | None = Field(default=None, description="token id: what is added to its logit")
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = Field(
        default=None, ge=0, description="give the log-probabilities of this many tokens at each position"
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=0, description="give the log-probabilities of this many tokens at each position of the prompt"
    )
    skip_special_tokens: bool | None = Field(default=None, description="leave special tokens out of the text")
    spaces_between_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = Field(
        default=None, description="what the answer must be: one of json (a schema), regex, choice, grammar, json_object"
    )

    @classmethod
    def disagreements(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        least, most = given.get("min_tokens"), given.get("max_tokens", cls.model_fields["max_tokens"].default)
        if isinstance(least, int) and isinstance(most, int) and least > most:
            yield "min_tokens", f"is {least}, which is more than max_tokens ({most})"

    def given(self) -> dict[str, Any]:
        """What has been said, by name."""
        return {name: value for name in Sampling.model_fields if (value := getattr(self, name)) is not None}


class Generate(Sampling):
    """Defaults for `qtool generate`; names are vLLM's."""

    prompts: list[str] = Field(default_factory=list, description="what `qtool run` has the quantized model continue")
    max_tokens: int | None = Field(default=64, gt=0, description="the most new tokens in an answer")
    temperature: float | None = Field(
        default=0.0, ge=0, le=2, description="the temperature of sampling; 0 always takes the likeliest token"
    )
    reasoning_parser: str | None = Field(
        default=None, description="vLLM's name for how the model marks its thinking; splits it from the answer"
    )
    tensor_parallel_size: int = Field(default=1, gt=0, description="cards that vLLM runs it over")
    distributed_executor: Literal["mp", "ray"] = Field(default="mp", description="ray where cards are in several hosts")


class Launch(Strict):
    """How the golden-stick engine runs a model that needs several cards (MindFormers, tensor parallel)."""

    devices: int = Field(default=1, gt=0, description="cards of one host")


class Repository(Strict):
    """Where the recipe's model can be downloaded from: `qtool download RECIPE`."""

    hub: Literal["huggingface", "modelers"]
    repo: RepositoryName = Field(description="ORG/NAME")
    revision: str | None = Field(default=None, description="branch, tag or commit; the default branch without")
    also: list[RepositoryName] = Field(
        default_factory=list, description="further names of the same model there, for when the first is gone"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """ORG/NAME, the one to be taken first."""
        return (self.repo, *self.also)


class Recipe(Strict):
    name: str = Field(pattern=NAME, json_schema_extra={FORM: FORMS[NAME]})
    description: str
    source: str | None = Field(
        default=None, description="the published choice that this recipe follows, with a reference"
    )
    model: Repository | None = Field(default=None, description="one model it is for, on a hub")
    match: Match = Match()
    osl: Literal["fast", "exact"] = Field(
        default="fast", description="exact repeats Golden Stick 1.4.1 step for step; fast searches better and cheaper"
    )
    effort: Literal["normal", "high"] = Field(
        default="normal",
        description="high weighs errors by how much they change what the model says, which takes gradients and time",
    )
    kv_cache: Literal["fp8", "int8"] | None = Field(
        default=None, description="how keys and values are kept in the cache; without it, as floats"
    )
    default_scheme: str = "w8a8"
    schemes: dict[str, list[Policy]] = Field(min_length=1)
    calibration: Calibration = Calibration()
    launch: Launch = Launch()
    export: Export = Export()
    eval: Evaluation = Evaluation()
    generate: Generate = Generate()

    @classmethod
    def disagreements(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        default, schemes = given.get("default_scheme"), given.get("schemes")
        if not isinstance(schemes, Mapping) or not schemes:
            return
        if "default_scheme" not in given:
            default = cls.model_fields["default_scheme"].default
            if default not in schemes:
                yield "schemes", f"has no {default!r}, which is the default_scheme unless the recipe names another"
        elif isinstance(default, str) and default not in schemes:
            yield "default_scheme", f"{default!r} is not one of the schemes {', '.join(map(str, schemes))}"

    def with_scheme(self, name: str) -> Recipe | None:
        """One that has a scheme of this name: this recipe, or with a usual precision that its layers are given.

        `named` of qtool.scheme knows the usual ones. Which layers stay float, and how the others are smoothed, clipped
        and rounded, is taken from w8a8-dynamic, or from the default scheme. None for a name that nobody knows.
        """
        if name in self.schemes:
            return self
        scheme = named(name)
        if scheme is None:
            return None
        model = self.schemes.get(_MODEL, self.schemes[self.default_scheme])
        made = [policy.with_scheme(scheme) if policy.quantize else policy for policy in model]
        return self.model_copy(update={"schemes": {**self.schemes, name: made}})

    def measured(self, scheme: str) -> Recipe:
        """The same with static activations of a scheme only where calibration finds that they cost little."""
        policies = [policy.measured() if policy.quantize else policy for policy in self.schemes[scheme]]
        return self.model_copy(update={"schemes": {**self.schemes, scheme: policies}})

    @property
    def cache(self) -> QuantizationArgs | None:
        """How keys and values are kept in the cache; None for floats."""
        return None if self.kv_cache is None else CACHES[self.kv_cache]

    def policy(self, scheme: str, linear: str) -> Policy | None:
        """The first policy of `scheme` that matches the linear's whole name, or None (it stays float).

        Raises:
            InputError: a pattern that takes too long to match.
        """
        for policy in self.schemes[scheme]:
            if patterns.fullmatch(policy.layers, linear, where=f"recipe {self.name}, scheme {scheme}"):
                return policy if policy.quantize else None
        return None
