"""Triton where it is there, and whether a kernel takes a tensor; else its reference in torch does."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for macOS and Windows
    triton = tl = None

# `@jit` and `@jit(options)`; without Triton the function itself, which nobody calls.
jit: Any = triton.jit if triton is not None else lambda function=None, **_: function or (lambda kernel: kernel)
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # triton, too, decides when imported


def reaches(x: Tensor) -> bool:
    """Whether Triton computes where x is: on a GPU, or anywhere under the interpreter."""
    return INTERPRETED or (triton is not None and x.is_cuda)
