"""Gated residual and the LayerNorm and modulation that follow it in a block (adaLN), one pass over rows each way.

With the vectors of a sample (gate, shift, scale) and the row y that attention has made of x,

    h = x + gate y,      m = n (1 + scale) + shift,      n = LayerNorm(h), as in `leapalign.kernels.blocks.modulate`,

and with gradients g of h and q of m, where dn = q (1 + scale) and r = 1 / sqrt(variance + eps) of the row,

    dx = g + r (dn - mean(dn) - n mean(dn n)),      dy = gate dx,
    dgate = Σ_t dx y,      dshift = Σ_t q,      dscale = Σ_t q n.

All arithmetic is fp32, and each output is rounded once; n is that of h as it is stored, so that h and m have the values
of `gated_residual` and `layer_norm_modulate` one after the other. dx is not rounded before it is multiplied by gate and
y. Saved for the backward: h, y, gate, scale and, a row, mean and r in fp32; not x. The sums are made in two stages
(`leapalign.kernels.blocks.rows`), the same bits in every run. A nan or inf that reaches h does what
`leapalign.kernels.blocks.modulate` says of one in its x, and makes dy's row and all of its sample's dgate nan.

Bytes an element in bf16: forward 4 read, 4 written (10 in two kernels); backward 8 read, 4 written (18 in two kernels
with the addition to g between them), and the sums' two stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leapalign.kernels.blocks import gated, modulate
from leapalign.kernels.blocks.modulate import gradient_of_row, statistics_of_row
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

BACKWARD_A_THREAD = 8  # elements a thread: 16 take 200 registers, which leaves a multiprocessor 8 warps


def gated_residual_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """h = x + gate y, and LayerNorm of h over the last dimension, times 1 + scale, plus shift: (B, T, D), contiguous.

    Args:
        x, y: (B, T, D), bfloat16 or float32 (on a GPU the kernel runs for these; others take the reference).
        gate, shift, scale: (B, D) of x's dtype; columns of a wider tensor are read where they are.
        eps: added to the variance.

    Raises:
        ValueError: a shape, dtype or device does not fit x.
    """
    check_rows(x, {"y": y}, {"gate": gate, "shift": shift, "scale": scale})
    h, m, _ = _operator(x, gate, y, shift, scale, eps)
    return h, m


@jit
def _forward(
    x_ptr: tl.tensor,  # (B, T, D), rows contiguous
    gate_ptr: tl.tensor,  # (B, D), rows contiguous
    y_ptr: tl.tensor,  # (B, T, D), rows contiguous
    shift_ptr: tl.tensor,  # (B, D), rows contiguous
    scale_ptr: tl.tensor,  # (B, D), rows contiguous
    h_ptr: tl.tensor,  # (B, T, D), contiguous
    m_ptr: tl.tensor,  # (B, T, D), contiguous
    statistics_ptr: tl.tensor,  # (B, T, 2) fp32, contiguous: mean, r
    tokens: tl.tensor,  # T
    eps: tl.tensor,
    x_batch: tl.tensor,  # strides, in elements
    x_row: tl.tensor,
    y_batch: tl.tensor,
    y_row: tl.tensor,
    gate_batch: tl.tensor,
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
    gate = tl.load(gate_ptr + batch * gate_batch + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * shift_batch + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1 + tl.load(scale_ptr + batch * scale_batch + columns, mask=inside, other=0.0).to(tl.float32)
    for token in range(first, min(first + ROWS, tokens)):
        row = batch * tokens + token
        x = tl.load(x_ptr + batch * x_batch + token * x_row + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + batch * y_batch + token * y_row + columns, mask=inside, other=0.0).to(tl.float32)
        h = (x + gate * y).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * D + columns, h, mask=inside)
        centred, mean, rstd = statistics_of_row(h.to(tl.float32), inside, eps, D)
        m = centred * rstd * factor + shift
        tl.store(m_ptr + row * D + columns, m.to(m_ptr.dtype.element_ty), mask=inside)
        tl.store(statistics_ptr + row * 2, mean)
        tl.store(statistics_ptr + row * 2 + 1, rstd)


@jit
def _backward(
    g_ptr: tl.tensor,  # (B, T, D), rows contiguous: gradient of h
    q_ptr: tl.tensor,  # (B, T, D), rows contiguous: gradient of m
    h_ptr: tl.tensor,  # (B, T, D), contiguous
    y_ptr: tl.tensor,  # (B, T, D), rows contiguous
    gate_ptr: tl.tensor,  # (B, D), rows contiguous
    scale_ptr: tl.tensor,  # (B, D), rows contiguous
    statistics_ptr: tl.tensor,  # (B, T, 2) fp32, contiguous: mean, r
    dx_ptr: tl.tensor,  # (B, T, D), contiguous
    dy_ptr: tl.tensor,  # (B, T, D), contiguous
    partial_ptr: tl.tensor,  # (B, groups, 3, D) fp32, contiguous: Σ dx y, Σ q, Σ q n over a group
    tokens: tl.tensor,  # T
    rows: tl.tensor,  # of a group
    g_batch: tl.tensor,  # strides, in elements
    g_row: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    y_batch: tl.tensor,
    y_row: tl.tensor,
    gate_batch: tl.tensor,
    scale_batch: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # the next power of two
) -> None:
    """Program (i, b): group i of sample b."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * rows
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    gate = tl.load(gate_ptr + batch * gate_batch + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1 + tl.load(scale_ptr + batch * scale_batch + columns, mask=inside, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    for token in range(first, min(first + rows, tokens)):
        row = batch * tokens + token
        q = tl.load(q_ptr + batch * q_batch + token * q_row + columns, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + batch * g_batch + token * g_row + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + batch * y_batch + token * y_row + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + row * 2)
        rstd = tl.load(statistics_ptr + row * 2 + 1)
        n = tl.where(inside, (h - mean) * rstd, 0.0)
        dx = g + gradient_of_row(q, n, factor, rstd, D)
        tl.store(dx_ptr + row * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dy_ptr + row * D + columns, (gate * dx).to(dy_ptr.dtype.element_ty), mask=inside)
        dgate += dx * y
        dshift += q
        dscale += q * n
    sums = partial_ptr + (batch * tl.num_programs(0) + tl.program_id(0)) * 3 * D
    tl.store(sums + columns, dgate, mask=inside)
    tl.store(sums + D + columns, dshift, mask=inside)
    tl.store(sums + 2 * D + columns, dscale, mask=inside)


def _launch(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, features = x.shape
    x, gate, y, shift, scale = (with_rows(tensor) for tensor in (x, gate, y, shift, scale))
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    m = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    statistics = torch.empty(batch, tokens, 2, dtype=torch.float32, device=x.device)  # kept for the backward
    if x.numel():
        with torch.cuda.device_of(x):
            _forward[-(-tokens // FORWARD_ROWS), batch](
                *(x, gate, y, shift, scale, h, m, statistics, tokens, eps),
                *(*x.stride()[:2], *y.stride()[:2], gate.stride(0), shift.stride(0), scale.stride(0)),
                **{"D": features, "ROWS": FORWARD_ROWS, **block_of(features)},
            )
    return h, m, statistics


def _launch_backward(
    g: Tensor, q: Tensor, h: Tensor, y: Tensor, gate: Tensor, scale: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, features = h.shape
    g, q, y, gate, scale = (with_rows(tensor) for tensor in (g, q, y, gate, scale))
    h, statistics = h.contiguous(), statistics.contiguous()
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dy = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not h.numel():
        return dx, dy, torch.zeros(batch, 3, features, dtype=gate.dtype, device=h.device)
    rows = rows_of_group(tokens)
    groups = -(-tokens // rows)
    partial = torch.empty(batch, groups, 3, features, dtype=torch.float32, device=h.device)  # until the second stage
    with torch.cuda.device_of(h):
        _backward[groups, batch](
            *(g, q, h, y, gate, scale, statistics, dx, dy, partial, tokens, rows),
            *(*g.stride()[:2], *q.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0)),
            **{"D": features, **block_of(features, BACKWARD_A_THREAD)},
        )
        return dx, dy, sum_groups(partial, gate.dtype)


@torch.library.custom_op("leapalign::gated_residual_modulate", mutates_args=())
def _operator(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h, m and the statistics (B, T, 2) of h's rows."""
    if runs_triton(x):
        return _launch(x, gate, y, shift, scale, eps)
    h = gated.reference(x, gate, y)
    return h, *modulate.reference(h, shift, scale, eps)


@_operator.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((*x.shape[:2], 2), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(x.shape), statistics


@torch.library.custom_op("leapalign::gated_residual_modulate_backward", mutates_args=())
def _gradients(
    g: Tensor, q: Tensor, h: Tensor, y: Tensor, gate: Tensor, scale: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dy (B, T, D); dgate, dshift and dscale in one tensor (B, 3, D)."""
    if runs_triton(h):
        return _launch_backward(g, q, h, y, gate, scale, statistics)
    dh, dshift, dscale = modulate.reference_backward(q, h, scale, statistics)
    dx = wide(g) + dh
    dy, dgate = gated.reference_backward(dx, gate, y)
    vectors = torch.stack([dgate, dshift, dscale], dim=1)
    return dx.to(h.dtype).contiguous(), dy.to(h.dtype).contiguous(), vectors.to(gate.dtype)


@_gradients.register_fake
def _(
    g: Tensor, q: Tensor, h: Tensor, y: Tensor, gate: Tensor, scale: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), gate.new_empty(h.shape[0], 3, h.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, gate, y, _, scale, _ = inputs
    h, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(h, y, gate, scale, statistics)


def _differentiate(ctx: Any, g: Tensor, q: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, dy, vectors = _gradients(g, q, *ctx.saved_tensors)
    dgate, dshift, dscale = vectors.unbind(1)
    return dx, dgate, dy, dshift, dscale, None


_operator.register_autograd(_differentiate, setup_context=_save)


def compilations() -> Iterator[Compilation]:
    """The kernels of this file for the models' blocks, any number of tokens."""
    for features in FEATURES:
        for type_ in TYPES:
            yield from compilation("gated_modulate.forward", _forward, type_, features, ROWS=FORWARD_ROWS)
            yield from compilation("gated_modulate.backward", _backward, type_, features, a_thread=BACKWARD_A_THREAD)
