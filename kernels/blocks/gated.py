"""Gated residual (adaLN), forward and backward.

With the vector `gate` of a sample and the row y that attention or a feed-forward has made of x (Peebles and Xie,
"Scalable Diffusion Models with Transformers", 2023),

    h = x + gate y,      dx = g,      dy = gate g,      dgate = Σ_t g y

with the gradient g of h, which is handed on as dx and not copied. All arithmetic is fp32, and each output is rounded
once: the plain code in bf16 rounds gate y too. Saved for the backward: y and gate. dgate is summed in two stages
(`leapalign.kernels.blocks.rows`), the same bits in every run. A nan or inf in x, y or g goes where the equations take
it.

Bytes an element in bf16: forward 4 read, 2 written; backward 4 read, 2 written, and the sum's two stages.
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


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y: (B, T, D), contiguous, in x's dtype.

    Args:
        x, y: (B, T, D), bfloat16 or float32 (on a GPU the kernel runs for these; others take the reference).
        gate: (B, D) of x's dtype; columns of a wider tensor are read where they are.

    Raises:
        ValueError: a shape, dtype or device does not fit x.
    """
    check_rows(x, {"y": y}, {"gate": gate})
    h: Tensor = _operator(x, gate, y)
    return h


def reference(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """h (B, T, D)."""
    return (wide(x) + wide(gate)[:, None] * wide(y)).to(x.dtype).contiguous()


def reference_backward(dx: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """dy (B, T, D) and dgate (B, D), float32 or better."""
    return wide(gate)[:, None] * wide(dx), (wide(dx) * wide(y)).sum(dim=1)


@jit
def _forward(
    x_ptr: tl.tensor,  # (B, T, D), rows contiguous
    gate_ptr: tl.tensor,  # (B, D), rows contiguous
    y_ptr: tl.tensor,  # (B, T, D), rows contiguous
    h_ptr: tl.tensor,  # (B, T, D), contiguous
    tokens: tl.tensor,  # T
    x_batch: tl.tensor,  # strides, in elements
    x_row: tl.tensor,
    y_batch: tl.tensor,
    y_row: tl.tensor,
    gate_batch: tl.tensor,
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
    for token in range(first, min(first + ROWS, tokens)):
        x = tl.load(x_ptr + batch * x_batch + token * x_row + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + batch * y_batch + token * y_row + columns, mask=inside, other=0.0).to(tl.float32)
        h = (x + gate * y).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + (batch * tokens + token) * D + columns, h, mask=inside)


@jit
def _backward(
    g_ptr: tl.tensor,  # (B, T, D), rows contiguous
    gate_ptr: tl.tensor,  # (B, D), rows contiguous
    y_ptr: tl.tensor,  # (B, T, D), rows contiguous
    dy_ptr: tl.tensor,  # (B, T, D), contiguous
    partial_ptr: tl.tensor,  # (B, groups, D) fp32, contiguous: Σ g y over a group
    tokens: tl.tensor,  # T
    rows: tl.tensor,  # of a group
    g_batch: tl.tensor,  # strides, in elements
    g_row: tl.tensor,
    y_batch: tl.tensor,
    y_row: tl.tensor,
    gate_batch: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # the next power of two
) -> None:
    """Program (i, b): group i of sample b."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * rows
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    gate = tl.load(gate_ptr + batch * gate_batch + columns, mask=inside, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK,), tl.float32)
    for token in range(first, min(first + rows, tokens)):
        g = tl.load(g_ptr + batch * g_batch + token * g_row + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + batch * y_batch + token * y_row + columns, mask=inside, other=0.0).to(tl.float32)
        dy = (gate * g).to(dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + (batch * tokens + token) * D + columns, dy, mask=inside)
        dgate += g * y
    sums = partial_ptr + (batch * tl.num_programs(0) + tl.program_id(0)) * D
    tl.store(sums + columns, dgate, mask=inside)


def _launch(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    batch, tokens, features = x.shape
    x, gate, y = with_rows(x), with_rows(gate), with_rows(y)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            _forward[-(-tokens // FORWARD_ROWS), batch](
                *(x, gate, y, h, tokens),
                *(*x.stride()[:2], *y.stride()[:2], gate.stride(0)),
                **{"D": features, "ROWS": FORWARD_ROWS, **block_of(features)},
            )
    return h


def _launch_backward(g: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, features = y.shape
    g, gate, y = with_rows(g), with_rows(gate), with_rows(y)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not y.numel():
        return dy, torch.zeros(batch, features, dtype=gate.dtype, device=y.device)
    rows = rows_of_group(tokens)
    groups = -(-tokens // rows)
    partial = torch.empty(batch, groups, 1, features, dtype=torch.float32, device=y.device)  # until the second stage
    with torch.cuda.device_of(y):
        _backward[groups, batch](
            *(g, gate, y, dy, partial, tokens, rows),
            *(*g.stride()[:2], *y.stride()[:2], gate.stride(0)),
            **{"D": features, **block_of(features)},
        )
        return dy, sum_groups(partial, gate.dtype).view(batch, features)


@torch.library.custom_op("leapalign::gated_residual", mutates_args=())
def _operator(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return _launch(x, gate, y) if runs_triton(x) else reference(x, gate, y)


@_operator.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("leapalign::gated_residual_backward", mutates_args=())
def _gradients(g: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """dy (B, T, D) and dgate (B, D)."""
    if runs_triton(y):
        return _launch_backward(g, gate, y)
    dy, dgate = reference_backward(g, gate, y)
    return dy.to(y.dtype).contiguous(), dgate.to(gate.dtype).contiguous()


@_gradients.register_fake
def _(g: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, gate, y = inputs
    ctx.save_for_backward(gate, y)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy, dgate = _gradients(g, *ctx.saved_tensors)
    return g, dgate, dy


_operator.register_autograd(_differentiate, setup_context=_save)


def compilations() -> Iterator[Compilation]:
    """The kernels of this file for the models' blocks, any number of tokens."""
    for features in FEATURES:
        for type_ in TYPES:
            yield from compilation("gated.forward", _forward, type_, features, ROWS=FORWARD_ROWS)
            yield from compilation("gated.backward", _backward, type_, features)
