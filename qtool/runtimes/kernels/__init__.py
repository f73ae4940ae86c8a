"""What vLLM gets of qtool: a plugin of vLLM's, which finds `register` by an entry point of the package."""

from __future__ import annotations

from qtool.runtimes.kernels import int8, tiles, weight_only


def register() -> None:
    """Give vLLM the kernels that it lacks here, or has wrong. A second call changes nothing."""
    tiles.allow()
    int8.decline_cutlass()
    int8.flatten_rows()
    int8.replace()
    weight_only.add()
