"""What it takes to compile a Triton kernel without a GPU: every kernel file lists its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """One kernel in one configuration, as its launcher would start it.

    Attributes:
        name: e.g. "modulate.forward bf16 3072".
        kernel: the `@triton.jit` function.
        signature: {argument: Triton's type}: "*bf16", "*fp32", "i32", "fp32", "u64"; "constexpr" for the constants.
        constants: {argument: value} of the constexpr arguments.
        aligned: arguments whose pointers or values are multiples of 16, as those of the launcher's calls are.
        num_warps, num_stages: of the launch.
        fp_fusion: whether a product and a sum may become one operation, rounded once.
        unstreamed: pointers to a few numbers of a row, block or program. Every other pointer's array passes through
            the kernel, and all accesses to it have to be 16 bytes wide.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True
    unstreamed: tuple[str, ...] = ()
