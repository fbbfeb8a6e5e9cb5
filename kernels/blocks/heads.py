"""Heads of q and k: what the forward and the backward of `leapalign.kernels.blocks.qk_norm_rope` share.

The statistic r = (mean(x²) + eps)^(-1/2), the rotation R(z) = (-z_1, z_0, -z_3, z_2, ...), and how heads are laid on
programs: a tile is HEADS heads of one token, eight numbers for every thread, so that bf16 is moved 16 bytes at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leapalign.kernels.dispatch import reaches, tl, triton

HEADS = 8  # of a tile: the 24 heads of FLUX and SD3.5-medium are three tiles, none of them padded
WIDEST = 1024  # largest head_dim: 32 warps a tile

# ---- reference -----------------------------------------------------------------------------------------------------


def accumulated(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on x: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """r: (..., D) -> (..., 1)."""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rotate(z: Tensor) -> Tensor:
    """R(z): (..., D)."""
    even, odd = z.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), -1).flatten(-2)


def rows(table: Tensor, x: Tensor, first: int) -> Tensor:
    """The part of cos or sin that belongs to x (B, T, heads, D): (T, 1, D)."""
    return table[first : first + x.shape[1], None].to(accumulated(x))


# ---- kernels -------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def optional(ptr, at, inside):  # type: ignore[no-untyped-def]
        if ptr is None:
            return None
        else:
            return tl.load(ptr + at, inside, other=0).to(tl.float32)

    @triton.jit
    def tile_rotate(z, HEADS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        even, odd = tl.split(tl.reshape(z, (HEADS, WIDTH // 2, 2)))
        return tl.reshape(tl.join(-odd, even), (HEADS, WIDTH))

    @triton.jit
    def tile_inverse_rms(x, eps, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
        return tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / DIM + eps)


def runs_triton(q: Tensor) -> bool:
    """Whether the kernels take it: float32 and bfloat16 on a GPU, or anywhere under the interpreter."""
    return reaches(q) and q.dtype in (torch.float32, torch.bfloat16) and q.shape[-1] <= WIDEST


def tiling(heads: int, dim: int) -> tuple[dict[str, int], int, int]:
    """(constants of a kernel, warps, tiles of a token)."""
    width = triton.next_power_of_2(dim)
    constants = {"ALL_HEADS": heads, "DIM": dim, "HEADS": HEADS, "WIDTH": width}
    return constants, max(1, HEADS * width // 256), -(-heads // HEADS)


def addressed(q: Tensor | None, k: Tensor | None) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """q and k as the kernels read them, and their strides: common ones, with the numbers of a head side by side."""
    given = [x for x in (q, k) if x is not None]
    if not given:
        return None, None, (0, 0, 0)
    strides = given[0].stride()
    if strides[-1] != 1 or any(x.stride() != strides for x in given):
        q, k = contiguous(q), contiguous(k)
        strides = next(x for x in (q, k) if x is not None).stride()
    return q, k, strides[:3]


def contiguous(x: Tensor | None) -> Tensor | None:
    """x, copied if its memory has gaps or another order."""
    return None if x is None else x.contiguous()


def empty(x: Tensor) -> Tensor:
    """Contiguous, of x's shape, dtype and device."""
    return x.new_empty(x.shape)
