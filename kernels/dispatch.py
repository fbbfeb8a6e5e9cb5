"""Triton where it is there, and whether a kernel takes a tensor; else its reference in torch does."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for macOS and Windows
    triton = tl = None

# `@jit` and `@jit(options)`; without Triton the function itself, which nobody calls.
jit: Any = triton.jit if triton is not None else lambda function=None, **_: function or (lambda kernel: kernel)
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # triton, too, decides when imported


_allowed = True


def allow(triton_kernels: bool) -> None:
    """Let operators of this process use Triton, or their references alone, as a flag of `torch.backends` would."""
    global _allowed
    _allowed = triton_kernels


def reaches(x: Tensor) -> bool:
    """Whether Triton computes where x is: on a GPU, or anywhere under the interpreter."""
    return reaches_device(x.device)


def reaches_device(device: torch.device) -> bool:
    """Whether Triton computes there; on meta nothing is computed."""
    if triton is None or not _allowed:
        return False
    return device.type == "cuda" or (INTERPRETED and device.type != "meta")
