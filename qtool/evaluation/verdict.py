"""What the figures of an evaluation mean, in plain sentences.

One figure is better or worse than another only where the 95 % confidence interval of their difference leaves out
zero; else they are "within noise" of each other: more text might tell them apart. Differences are taken window by
window, since all models predict the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtool import sizes
from qtool.evaluation.intervals import Estimate, estimate

Result = Mapping[str, Any]
"""What `qtool eval --json` prints of one model."""

_ONE_WINDOW = "One window of text gives no interval. Use --windows 2 or more to tell a difference from noise."


def names(results: Sequence[Result]) -> list[str]:
    """What the quantized models are called: the folder's name, and as much of its path as tells it from others."""
    paths = [Path(result["quantized"]) for result in results]
    bases = {Path(result["base"]).name for result in results}
    found = []
    for path in paths:
        parts, count = path.parts, 1
        while count < len(parts) and (
            sum(other.parts[-count:] == parts[-count:] for other in paths) > 1 or (count == 1 and parts[-1] in bases)
        ):
            count += 1
        found.append("/".join(parts[-count:]))
    return found


def of_all(results: Sequence[Result]) -> list[str]:
    """What is to be said first: of one model how it compares with its original, of several with each other, too."""
    if len(results) == 1:
        return of_one(results[0], names(results)[0])
    return of_several(results)


def of_one(result: Result, name: str) -> list[str]:
    """A quantized model against its original, in two or three sentences."""
    base, ratio = Path(result["base"]).name, result["perplexity_ratio"]
    both = f"{result['quantized_perplexity']['value']:.3f} against {result['base_perplexity']['value']:.3f}"
    if result["kl_divergence"]["value"] == 0 and result["kl_max"]["value"] == 0:
        return [f"{name} computes the same as {base}.", _size(result)]
    change = f"{_percent(ratio['value'])}{_between(ratio, _percent)}"
    if ratio["low"] is None:
        said = [f"The perplexity of {name} is {both} of {base}, {change}.", _ONE_WINDOW]
    else:
        said = [f"{name} is {_than(ratio, 1.0)} {base} in perplexity: {both}, {change}."]
    agreement, kl = result["top1_agreement"], result["kl_divergence"]
    said.append(
        f"Both find the same token likeliest in {agreement['value']:.1%} of all places"
        f"{_between(agreement, lambda value: f'{value:.1%}')}; "
        f"the KL divergence is {kl['value']:.5f} nats per token{_between(kl, lambda value: f'{value:.5f}')}."
    )
    return [*said, _size(result)]


def of_several(results: Sequence[Result]) -> list[str]:
    """Which of several quantized models is nearest to the original, and whether the others are really farther away."""
    called = dict(zip(map(id, results), names(results), strict=True))
    best, *others = sorted(results, key=lambda result: result["kl_divergence"]["value"])
    base, name = Path(best["base"]).name, called[id(best)]
    said = [f"{name} is nearest to {base}: a KL divergence of {best['kl_divergence']['value']:.5f} nats per token."]
    for other in others:
        gap = difference(other, best)
        more = f"{gap['value']:+.5f} nats per token{_between(gap, lambda value: f'{value:+.5f}')}"
        if gap["low"] is None:
            said.append(f"{called[id(other)]} has {more}.")
        else:
            said.append(f"{called[id(other)]} is {_than(gap, 0.0)} {name}: {more}; {_less(other, best)}.")
    return [*said, *([_ONE_WINDOW] if results[0]["text"]["windows"] == 1 else [])]


def difference(one: Result, other: Result) -> Estimate:
    """How much larger the KL divergence of `one` is, nats per token, with the interval of the paired difference."""
    pairs = zip(one["kl_by_window"], other["kl_by_window"], strict=True)
    return estimate([first - second for first, second in pairs])


def _than(figure: Estimate, equal: float) -> str:
    """Of a figure of which less is better."""
    assert figure["low"] is not None
    assert figure["high"] is not None
    if figure["low"] > equal:
        return "worse than"
    return "better than" if figure["high"] < equal else "within noise of"


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.2%}"


def _between(figure: Estimate, show: Any) -> str:
    if figure["low"] is None or figure["high"] is None:
        return ""
    return f" (95 % interval {show(figure['low'])} to {show(figure['high'])})"


def nbytes(result: Result, which: str = "quantized") -> int:
    """Bytes of all tensors of a model: quantized or base."""
    return sum(result["sizes"][which].values())


def _size(result: Result) -> str:
    small, large = nbytes(result), nbytes(result, "base")
    return f"It takes {small / large:.0%} of the original's bytes: {sizes.show(small)} of {sizes.show(large)}."


def _less(one: Result, other: Result) -> str:
    mine, its = nbytes(one), nbytes(other)
    if sizes.show(mine) == sizes.show(its):
        return f"both take {sizes.show(mine)}"
    if abs(1 - mine / its) < 0.005:
        return f"both take about {sizes.show(mine)}"
    return f"it takes {abs(1 - mine / its):.0%} {'fewer' if mine < its else 'more'} bytes"
