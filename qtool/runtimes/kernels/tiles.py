"""AMX tiles, which a process must ask Linux for."""

from __future__ import annotations


def allow() -> None:
    """Ask for this process's use of them, where the processor has them.

    vLLM 0.32's attention on CPUs takes them for granted. oneDNN asks for them when it first multiplies with them, which
    a model with small matrices never makes it do: its process dies of SIGILL at the first `tilezero`.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
