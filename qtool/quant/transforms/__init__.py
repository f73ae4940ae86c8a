"""What is done to a group of linears before it is rounded, and leaves what it computes as it is.

One more is one more file with a `GroupTransform`, and a line in `TRANSFORMS`; a recipe asks for it by that name.
"""

from __future__ import annotations

from qtool.quant.transforms.diagonal import Diagonal, GroupTransform
from qtool.quant.transforms.folded import Folded
from qtool.quant.transforms.osl import OSL
from qtool.quant.transforms.smoothquant import SmoothQuant
from qtool.recipe.policy import Policy

__all__ = ["TRANSFORMS", "Diagonal", "Folded", "GroupTransform", "transform_of"]

TRANSFORMS: dict[str, type[GroupTransform]] = {"osl": OSL, "smoothquant": SmoothQuant}


def transform_of(policy: Policy) -> GroupTransform | None:
    """What a policy asks for, if anything."""
    method = policy.smoothing.method
    return None if method == "none" else TRANSFORMS[method](policy)
