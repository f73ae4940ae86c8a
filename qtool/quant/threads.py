"""Keeping many small tensor operations on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single() -> Iterator[None]:
    """One thread within the block: operations of microseconds spend longer meeting at a barrier than working,
    and a barrier waits for whatever else the cores are busy with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
