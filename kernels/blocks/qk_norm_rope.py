"""RMSNorm of every head of q and k, then the rotary embedding: one launch for both.

For one head x of D numbers, its weight w (D,) and the row's cos c and sin s (D,) each (Zhang and Sennrich, "Root mean
square layer normalization", 2019; Su et al., "RoFormer", 2021, with neighbouring numbers as the pairs):

    n = x r,  r = (mean(x²) + eps)^(-1/2),    z = n w,    y = z c + R(z) s,  R(z) = (-z_1, z_0, -z_3, z_2, ...)

Either weight may be absent (that side is not normalised: z = x), and so may cos and sin (y = z, as in SD3). It is what
`torch.nn.RMSNorm(D)` and then diffusers' `apply_rotary_emb(..., use_real_unbind_dim=-1, sequence_dim=1)` do, in float32
throughout (float64 for float64), with one rounding to the output's dtype. They round z too, so with the dtype's unit
roundoff u they differ from this by up to u (|z c| + |R(z) s|) + 2 u |y|. diffusers' own RMSNorm, which SD3 has, rounds
n as well, which is up to u (|z c| + |R(z) s|) more.

A head with an inf or a nan is what it is in torch: nan all over for a nan; for an inf, nan in its place and its pair's,
zeros elsewhere. No other head is touched. The backward is in `leapalign.kernels.blocks.qk_norm_rope_backward`; only
inputs are saved for it: r would be 4 bytes a head to save D multiplications on numbers that are read anyway.

Bytes a token, H heads, bf16: 4 · 2HD, q and k in and out, and 8D for cos and sin: 25.6 kB in FLUX (H = 24, D = 128).
Eagerly they are 56 · 2HD: a norm moves 2 · 2HD and a rotation, mostly in float32, 26 · 2HD. The text and image tokens
of a double block have weights of their own, so each part is a call of its own, with `first`, and torch.cat joins them;
another 4 · 2HD a token, which writing into slices of joint tensors would save.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from leapalign.kernels.blocks import qk_norm_rope_backward
from leapalign.kernels.blocks.heads import (
    accumulated,
    addressed,
    contiguous,
    empty,
    inverse_rms,
    rotate,
    rows,
    runs_triton,
    tiling,
)
from leapalign.kernels.compilation import Compilation

try:
    import triton
    import triton.language as tl

    from leapalign.kernels.blocks.heads import optional, tile_inverse_rms, tile_rotate
except ImportError:  # no Triton for this platform: the reference everywhere
    triton = None

GROUP = 4  # tokens of a program, which share its loads of the weights


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """q' and k' for attention: new, contiguous, of q's shape and dtype. Differentiable in q, k and the weights.

    Args:
        q, k: (B, T, heads, D) views of the projections, of one shape and dtype; of any strides, read where they are if
            the D numbers lie side by side and both have the same strides.
        weight_q, weight_k: (D,) of the norms, or None: not normalised.
        cos, sin: (rows, D) of all positions, float32, or both None: not rotated. Constants to autograd.
        eps: added to the mean square.
        first: row of cos and sin of the first token, such as the number of text tokens before these.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    _check(q, k, (weight_q, weight_k), cos, sin, first)
    turned: tuple[Tensor, Tensor] = torch.ops.leapalign.qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps, first)
    return turned


# ---- reference -----------------------------------------------------------------------------------------------------


def forward_reference(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, first: int
) -> Tensor:
    """y of one side, before it is rounded: (B, T, heads, D) in float32 or better."""
    z = x.to(accumulated(x))
    if weight is not None:
        z = z * inverse_rms(z, eps) * weight
    if cos is None or sin is None:
        return z
    return z * rows(cos, x, first) + rotate(z) * rows(sin, x, first)


# ---- kernel --------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def forward_side(  # type: ignore[no-untyped-def]
        x_ptr, weight, cos, sin, out_ptr, at, out_at, inside, eps,
        DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        y = tl.load(x_ptr + at, inside, other=0).to(tl.float32)
        if weight is not None:
            y = y * tile_inverse_rms(y, eps, DIM) * weight
        if cos is not None:
            y = y * cos + tile_rotate(y, HEADS, WIDTH) * sin
        tl.store(out_ptr + out_at, y, inside)

    @triton.jit(do_not_specialize=["tokens", "length", "first", "group"])  # one binary for every size
    def forward_kernel(  # type: ignore[no-untyped-def]
        q_ptr,  # (B, T, ALL_HEADS, DIM) with the strides below; so k
        k_ptr,
        weight_q_ptr,  # (DIM,) or None; so weight_k
        weight_k_ptr,
        cos_ptr,  # (rows, DIM) or None; so sin
        sin_ptr,
        out_q_ptr,  # (B, T, ALL_HEADS, DIM), contiguous; so out_k
        out_k_ptr,
        batch_stride,
        token_stride,
        head_stride,
        tokens,  # B T
        length,  # T
        first,
        group,  # tokens of a program
        eps,
        ALL_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        HEADS: tl.constexpr,
        WIDTH: tl.constexpr,  # DIM, or the next power of two
    ):
        tiles: tl.constexpr = (ALL_HEADS + HEADS - 1) // HEADS
        program = tl.program_id(0)
        head = program % tiles * HEADS + tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, WIDTH)[None, :]
        inside = (head < ALL_HEADS) & (column < DIM)
        shared = tl.broadcast_to(column, (HEADS, WIDTH))  # the same numbers for every head
        weight_q = optional(weight_q_ptr, shared, inside)
        weight_k = optional(weight_k_ptr, shared, inside)
        start = program // tiles * group
        for step in range(tl.minimum(group, tokens - start)):
            token = start + step
            row = token % length
            at = (token // length).to(tl.int64) * batch_stride + row.to(tl.int64) * token_stride
            at += head * head_stride + column
            out_at = token.to(tl.int64) * ALL_HEADS * DIM + head * DIM + column
            cos = optional(cos_ptr, (first + row) * DIM + shared, inside)
            sin = optional(sin_ptr, (first + row) * DIM + shared, inside)
            forward_side(q_ptr, weight_q, cos, sin, out_q_ptr, at, out_at, inside, eps, DIM, HEADS, WIDTH)
            forward_side(k_ptr, weight_k, cos, sin, out_k_ptr, at, out_at, inside, eps, DIM, HEADS, WIDTH)


def launch(
    q: Tensor, k: Tensor, weights: tuple[Tensor | None, ...], tables: tuple[Tensor | None, ...], eps: float, first: int
) -> tuple[Tensor, Tensor]:
    """q' and k' of weights (q, k) and tables (cos, sin)."""
    out = empty(q), empty(k)
    batch, length, heads, dim = q.shape
    constants, warps, tiles = tiling(heads, dim)
    q_at, k_at, strides = addressed(q, k)
    if q.numel():
        with torch.cuda.device_of(q):
            forward_kernel[(-(-batch * length // GROUP) * tiles,)](
                q_at, k_at, *map(contiguous, weights + tables), *out, *strides, batch * length, length, first, GROUP,
                eps, **constants, num_warps=warps,
            )  # fmt: skip
    return out


# ---- custom op -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("leapalign::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor | None, weight_k: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    eps: float, first: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if runs_triton(q):
        return launch(q, k, (weight_q, weight_k), (cos, sin), eps, first)
    out_q = empty(q).copy_(forward_reference(q, weight_q, cos, sin, eps, first))
    return out_q, empty(k).copy_(forward_reference(k, weight_k, cos, sin, eps, first))


@_qk_norm_rope.register_fake
def _(q, k, weight_q, weight_k, cos, sin, eps, first):  # type: ignore[no-untyped-def]
    return empty(q), empty(k)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, weight_q, weight_k, cos, sin, ctx.eps, ctx.first = inputs
    # A rotation alone needs nothing of what it turned.
    x_q, x_k = None if weight_q is None else q, None if weight_k is None else k
    ctx.save_for_backward(x_q, x_k, weight_q, weight_k, cos, sin)


def _backward(ctx, dy_q, dy_k):  # type: ignore[no-untyped-def]
    saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:4]
    dq, dk, *dw = torch.ops.leapalign.qk_norm_rope_backward(dy_q, dy_k, *saved, ctx.eps, ctx.first, any(wanted))
    return dq, dk, *(grad if needed else None for grad, needed in zip(dw, wanted, strict=True)), None, None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_save)


def _check(
    q: Tensor,
    k: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
) -> None:
    """Raise ValueError where the arguments of `qk_norm_rope` do not belong together."""
    if q.ndim != 4 or q.shape != k.shape or q.dtype != k.dtype or q.device != k.device or q.shape[-1] == 0:
        raise ValueError(
            f"q is {q.dtype} {tuple(q.shape)} on {q.device}, k {k.dtype} {tuple(k.shape)} on {k.device}: "
            "give both as (B, T, heads, D) of one shape, dtype and device"
        )
    length, dim = q.shape[1], q.shape[-1]
    for name, weight in zip(("weight_q", "weight_k"), weights, strict=True):
        if weight is not None and (weight.shape != (dim,) or weight.device != q.device):
            raise ValueError(
                f"{name} is {tuple(weight.shape)} on {weight.device}; heads of {dim} on {q.device} have ({dim},) there"
            )
    if cos is None and sin is None:
        return
    if cos is None or sin is None or cos.shape != sin.shape or cos.ndim != 2 or cos.shape[1] != dim or dim % 2:
        shapes = [None if table is None else tuple(table.shape) for table in (cos, sin)]
        raise ValueError(
            f"cos and sin are {shapes[0]} and {shapes[1]}; heads of {dim} are turned in pairs by two tables "
            f"(rows, {dim}), an even number: give both or neither"
        )
    if first < 0 or first + length > cos.shape[0]:
        raise ValueError(
            f"first={first} and {length} tokens, but cos and sin have {cos.shape[0]} rows: give those of all positions"
        )
    if cos.device != q.device or sin.device != q.device:
        raise ValueError(f"cos and sin are on {cos.device} and {sin.device}, q on {q.device}: move them there once")


# ---- what the launchers start --------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """Both directions as FLUX (24 heads of 128, normalised and turned) and SD3.5 (of 64, normalised) start them."""
    if triton is None:
        return
    for number, (model, dim, turned) in product(("bf16", "fp32"), (("FLUX", 128, True), ("SD3.5", 64, False))):
        x, tables = f"*{number}", ("cos_ptr", "sin_ptr")
        constants, warps, _ = tiling(24, dim)
        signature = dict.fromkeys(("q_ptr", "k_ptr", "weight_q_ptr", "weight_k_ptr", "out_q_ptr", "out_k_ptr"), x)
        signature |= dict.fromkeys(("batch_stride", "token_stride", "head_stride"), "i32")
        fixed = constants | ({} if turned else dict.fromkeys(tables))
        signature |= dict.fromkeys(tables, "*fp32") if turned else {}
        aligned = tuple(signature)
        signature |= dict.fromkeys(("tokens", "length", "first", "group"), "i32") | {"eps": "fp32"}
        signature |= dict.fromkeys(fixed, "constexpr")
        name = f"qk_norm_rope forward {model} {number}"
        yield Compilation(name, forward_kernel, signature, fixed, aligned, warps)
    yield from qk_norm_rope_backward.compilations()
