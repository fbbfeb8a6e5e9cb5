"""LayerNorm without affine, then per-sample scale and shift (adaLN), forward and backward, one pass over rows each.

For a row x of D features, with the vectors of its sample (Peebles and Xie, "Scalable Diffusion Models with
Transformers", 2023; `AdaLayerNormZero` and its kin in diffusers, eps 1e-6):

    n = (x - μ) r,    μ = mean(x),    r = 1 / sqrt(mean((x - μ)²) + eps),      y = n (1 + scale) + shift

and with the gradient g of y

    dn = g (1 + scale),      dx = r (dn - mean(dn) - n mean(dn n)),      dshift = Σ_t g,      dscale = Σ_t g n.

All arithmetic is fp32, and each output is rounded once: for bf16 the plain code rounds n, 1 + scale, their product and
the sum. Saved for the backward: x, scale and, a row, μ and r in fp32.

The sums over the tokens are made in two stages (`leapalign.kernels.blocks.rows`), the same bits in every run.

A nan or inf in x makes its row of y and dx, and all of its sample's dscale, nan; one in g spoils its row of dx and its
column of dshift and dscale. Squares are added in fp32: at D = 3072 the |x - μ| of a row must stay below 3e17.

Bytes an element in bf16: forward 2 read, 2 written; backward 4 read, 2 written, and the sums' two stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leapalign.kernels.blocks.rows import (
    FEATURES,
    FORWARD_ROWS,
    TYPES,
    block_of,
    check_rows,
    compilation,
    jit,
    rows_of_group,
    runs_triton,
    sum_groups,
    tl,
    wide,
    with_rows,
)
from leapalign.kernels.compilation import Compilation


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension, times 1 + scale, plus shift: (B, T, D), contiguous, in x's dtype.

    Args:
        x: (B, T, D) tokens, bfloat16 or float32 (on a GPU the kernel runs for these; others take the reference).
        shift, scale: (B, D) of x's dtype; columns of a wider tensor are read where they are.
        eps: added to the variance.

    Raises:
        ValueError: a shape, dtype or device does not fit x.
    """
    check_rows(x, {}, {"shift": shift, "scale": scale})
    y, _ = _operator(x, shift, scale, eps)
    return y


def reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and the statistics (B, T, 2) of the rows, μ and r, float32 or better."""
    mean = wide(x).mean(dim=-1, keepdim=True)
    centred = wide(x) - mean
    rstd = centred.square().mean(dim=-1, keepdim=True).add(eps).rsqrt()
    y = centred * rstd * (1 + wide(scale)[:, None]) + wide(shift)[:, None]
    return y.to(x.dtype).contiguous(), torch.cat([mean, rstd], dim=-1)


def reference_backward(g: Tensor, x: Tensor, scale: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, T, D), dshift and dscale (B, D), float32 or better."""
    mean, rstd = statistics.split(1, dim=-1)
    n = (wide(x) - mean) * rstd
    dn = wide(g) * (1 + wide(scale)[:, None])
    dx = rstd * (dn - dn.mean(dim=-1, keepdim=True) - n * (dn * n).mean(dim=-1, keepdim=True))
    return dx, wide(g).sum(dim=1), (wide(g) * n).sum(dim=1)


@jit
def statistics_of_row(
    x: tl.tensor,  # (BLOCK,) fp32, zero outside
    inside: tl.tensor,  # (BLOCK,) whether a column is one of the D
    eps: tl.tensor,
    D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """x - μ, zero outside, and μ and r."""
    mean = tl.sum(x) / D
    centred = tl.where(inside, x - mean, 0.0)
    return centred, mean, 1 / tl.sqrt_rn(tl.sum(centred * centred) / D + eps)


@jit
def gradient_of_row(
    g: tl.tensor,  # (BLOCK,) fp32, zero outside
    n: tl.tensor,  # (BLOCK,) fp32, zero outside
    factor: tl.tensor,  # (BLOCK,) fp32, 1 + scale
    rstd: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:
    """dx of the equation above."""
    dn = g * factor
    return rstd * (dn - tl.sum(dn) / D - n * (tl.sum(dn * n) / D))


@jit
def _forward(
    x_ptr: tl.tensor,  # (B, T, D), rows contiguous
    shift_ptr: tl.tensor,  # (B, D), rows contiguous
    scale_ptr: tl.tensor,  # (B, D), rows contiguous
    y_ptr: tl.tensor,  # (B, T, D), contiguous
    statistics_ptr: tl.tensor,  # (B, T, 2) fp32, contiguous: μ, r
    tokens: tl.tensor,  # T
    eps: tl.tensor,
    x_batch: tl.tensor,  # strides, in elements
    x_row: tl.tensor,
    shift_batch: tl.tensor,
    scale_batch: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # the next power of two
) -> None:
    """Program (i, b): tokens i ROWS .. of sample b."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    shift = tl.load(shift_ptr + batch * shift_batch + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1 + tl.load(scale_ptr + batch * scale_batch + columns, mask=inside, other=0.0).to(tl.float32)
    for token in range(first, min(first + ROWS, tokens)):
        row = batch * tokens + token
        x = tl.load(x_ptr + batch * x_batch + token * x_row + columns, mask=inside, other=0.0)
        centred, mean, rstd = statistics_of_row(x.to(tl.float32), inside, eps, D)
        y = centred * rstd * factor + shift
        tl.store(y_ptr + row * D + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(statistics_ptr + row * 2, mean)
        tl.store(statistics_ptr + row * 2 + 1, rstd)


@jit
def _backward(
    g_ptr: tl.tensor,  # (B, T, D), rows contiguous
    x_ptr: tl.tensor,  # (B, T, D), rows contiguous
    scale_ptr: tl.tensor,  # (B, D), rows contiguous
    statistics_ptr: tl.tensor,  # (B, T, 2) fp32, contiguous: μ, r
    dx_ptr: tl.tensor,  # (B, T, D), contiguous
    partial_ptr: tl.tensor,  # (B, groups, 2, D) fp32, contiguous: Σ g, Σ g n over a group
    tokens: tl.tensor,  # T
    rows: tl.tensor,  # of a group
    g_batch: tl.tensor,  # strides, in elements
    g_row: tl.tensor,
    x_batch: tl.tensor,
    x_row: tl.tensor,
    scale_batch: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # the next power of two
) -> None:
    """Program (i, b): group i of sample b."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * rows
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    factor = 1 + tl.load(scale_ptr + batch * scale_batch + columns, mask=inside, other=0.0).to(tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    for token in range(first, min(first + rows, tokens)):
        row = batch * tokens + token
        g = tl.load(g_ptr + batch * g_batch + token * g_row + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + batch * x_batch + token * x_row + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + row * 2)
        rstd = tl.load(statistics_ptr + row * 2 + 1)
        n = tl.where(inside, (x - mean) * rstd, 0.0)
        dx = gradient_of_row(g, n, factor, rstd, D)
        tl.store(dx_ptr + row * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dshift += g
        dscale += g * n
    sums = partial_ptr + (batch * tl.num_programs(0) + tl.program_id(0)) * 2 * D
    tl.store(sums + columns, dshift, mask=inside)
    tl.store(sums + D + columns, dscale, mask=inside)


def _launch(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    batch, tokens, features = x.shape
    x, shift, scale = with_rows(x), with_rows(shift), with_rows(scale)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    statistics = torch.empty(batch, tokens, 2, dtype=torch.float32, device=x.device)  # kept for the backward
    if x.numel():
        with torch.cuda.device_of(x):
            _forward[-(-tokens // FORWARD_ROWS), batch](
                *(x, shift, scale, y, statistics, tokens, eps),
                *(*x.stride()[:2], shift.stride(0), scale.stride(0)),
                **{"D": features, "ROWS": FORWARD_ROWS, **block_of(features)},
            )
    return y, statistics


def _launch_backward(g: Tensor, x: Tensor, scale: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, features = x.shape
    g, x, scale, statistics = with_rows(g), with_rows(x), with_rows(scale), statistics.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx, torch.zeros(batch, 2, features, dtype=scale.dtype, device=x.device)
    rows = rows_of_group(tokens)
    groups = -(-tokens // rows)
    partial = torch.empty(batch, groups, 2, features, dtype=torch.float32, device=x.device)  # until the second stage
    with torch.cuda.device_of(x):
        _backward[groups, batch](
            *(g, x, scale, statistics, dx, partial, tokens, rows),
            *(*g.stride()[:2], *x.stride()[:2], scale.stride(0)),
            **{"D": features, **block_of(features)},
        )
        return dx, sum_groups(partial, scale.dtype)


@torch.library.custom_op("leapalign::layer_norm_modulate", mutates_args=())
def _operator(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch(x, shift, scale, eps) if runs_triton(x) else reference(x, shift, scale, eps)


@_operator.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    statistics = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((*x.shape[:2], 2), dtype=statistics)


@torch.library.custom_op("leapalign::layer_norm_modulate_backward", mutates_args=())
def _gradients(g: Tensor, x: Tensor, scale: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """dx (B, T, D); dshift and dscale in one tensor (B, 2, D)."""
    if runs_triton(x):
        return _launch_backward(g, x, scale, statistics)
    dx, dshift, dscale = reference_backward(g, x, scale, statistics)
    return dx.to(x.dtype).contiguous(), torch.stack([dshift, dscale], dim=1).to(scale.dtype)


@_gradients.register_fake
def _(g: Tensor, x: Tensor, scale: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(x.shape[0], 2, x.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, scale, _ = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, scale, statistics)


def _differentiate(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, vectors = _gradients(g, *ctx.saved_tensors)
    dshift, dscale = vectors.unbind(1)
    return dx, dshift, dscale, None


_operator.register_autograd(_differentiate, setup_context=_save)


def compilations() -> Iterator[Compilation]:
    """The kernels of this file for the models' blocks, any number of tokens."""
    for features in FEATURES:
        for type_ in TYPES:
            yield from compilation("modulate.forward", _forward, type_, features, ROWS=FORWARD_ROWS)
            yield from compilation("modulate.backward", _backward, type_, features)
