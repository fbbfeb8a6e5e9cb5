"""q and k normalised and turned, against float64: the kernels under Triton's interpreter, or the reference.

`test_qk_norm_rope.py` runs this file in a process with TRITON_INTERPRET=1, and its functions once more without. Bounds
follow the longest path to an output, to first order in u = 2^-24 and 1% more; a sum of K numbers, in whatever order, is
off by at most K u times the sum of magnitudes, the division of a mean included. With |·| elementwise, hats for what is
computed, and the equations' names:

    ρ = |r̂/r - 1| <= (K + 2) u / 2 + 4 u                  K = D; squares, sum, eps; an approximate root, 2 ulp
    |ŷ - y| <= (ρ + 4 u) a,   a = |z c| + |R(z) s|         n, z, the products, their sum

and for the gradients, with A = |dy c| + |R(dy s)| and M = mean(A |w n|), and L summands of dw:

    dz: 2 u A,    dz n: (ρ + 4 u) A |n|,    dw: (ρ + (4 + L) u) Σ A |n|
    mean(dz w n): (ρ + (K + 6) u) M,        dx: r ((ρ + 5 u) A |w| + (3 ρ + (K + 10) u) |n| M)

To that comes the output's own rounding: in bf16 2^-8 relative, 2^-7 under the interpreter, which cuts off.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from leapalign.kernels.blocks import heads, qk_norm_rope_backward
from leapalign.kernels.blocks.heads import inverse_rms, rotate, rows
from leapalign.kernels.blocks.qk_norm_rope import forward_reference, qk_norm_rope
from leapalign.kernels.dispatch import INTERPRETED

U = 2.0**-24
OUTPUT = {torch.float32: U, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}
TINY = 2.0**-126  # what is smaller may be flushed
EPS = 1e-6
MORE = 3  # rows of cos and sin behind the last token


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    normalised: tuple[bool, bool] = (True, True)
    turned: bool = True
    first: int = 0


# FLUX's and SD3.5's heads; tails of the head's block (20 of 32), of the heads of a tile (9 of 16), of the tokens of a
# program (9 of 4 and of 8); text and image tokens; only one side normalised; only turned; one number a head; no tokens.
CASES = [
    Case((1, 2, 24, 128), first=2),
    Case((1, 2, 24, 64), turned=False),
    Case((1, 9, 9, 20), first=1),
    Case((2, 3, 3, 16)),
    Case((1, 2, 3, 6), normalised=(True, False)),
    Case((1, 2, 3, 6), normalised=(False, True), turned=False),
    Case((2, 2, 1, 8), normalised=(False, False)),
    Case((1, 1, 1, 1), turned=False),
    Case((0, 4, 2, 8)),
]
CASED = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    weight_q: Tensor | None
    weight_k: Tensor | None
    cos: Tensor | None
    sin: Tensor | None

    def leaves(self) -> Inputs:
        parts = [None if x is None else x.detach().requires_grad_(at < 4) for at, x in enumerate(self)]
        return Inputs(*parts)  # type: ignore[arg-type]


def make(case: Case, dtype: torch.dtype) -> Inputs:
    """q and k are parts of one projection; cos and sin differ within a pair, so that a wrong partner shows."""
    batch, tokens, count, dim = case.shape
    fused = randn(batch, tokens, 3 * count * dim, seed=1).to(dtype)
    q, k, _ = (part.unflatten(-1, (count, dim)) for part in fused.chunk(3, dim=-1))
    weights = [(1 + randn(dim, seed=2 + side) / 4).to(dtype) if case.normalised[side] else None for side in (0, 1)]
    angles = randn(case.first + tokens + MORE, dim, seed=4) * 3
    tables = (angles.cos(), angles.sin()) if case.turned else (None, None)
    return Inputs(q, k, *weights, *tables)


def gradients_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As attention returns them: heads before tokens in memory."""
    batch, tokens, count, dim = case.shape
    dy = [randn(batch, count, tokens, dim, seed=5 + side).to(dtype).transpose(1, 2) for side in (0, 1)]
    return dy[0], dy[1]


def run(case: Case, inputs: Inputs, dy: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """([q', k'], [dq, dk, dw_q, dw_k])."""
    leaves = inputs.leaves()
    outputs = list(qk_norm_rope(*leaves, EPS, case.first))
    torch.autograd.backward(outputs, dy)
    return outputs, [None if x is None else x.grad for x in leaves[:4]]


def doubled(inputs: Inputs, side: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(x, w, cos, sin) of a side in float64: what the tensors hold exactly."""
    wide = [None if x is None else x.detach().double() for x in (inputs[side], *inputs[2:])]
    assert wide[0] is not None
    return wide[0], wide[1 + side], wide[3], wide[4]


def turn_magnitudes(z: Tensor, cos: Tensor | None, sin: Tensor | None, first: int, *, back: bool = False) -> Tensor:
    """|z c| + |R(z) s|, or |z c| + |R(z s)|."""
    if cos is None or sin is None:
        return z.abs()
    c, s = rows(cos, z, first), rows(sin, z, first)
    return (z * c).abs() + (rotate(z * s) if back else rotate(z) * s).abs()


def compare(found: Tensor, expected: Tensor, arithmetic: Tensor) -> None:
    """Within the bound of the arithmetic and the output's rounding."""
    excess = (found.double() - expected).abs() - 1.01 * (arithmetic + OUTPUT[found.dtype] * expected.abs()) - TINY
    assert found.shape == expected.shape and found.is_contiguous()
    assert excess.numel() == 0 or excess.max() <= 0, f"{excess.max():.3g} beyond the bound"


def check(case: Case, inputs: Inputs, dtype: torch.dtype) -> None:
    dy = gradients_of(case, dtype)
    outputs, gradients = run(case, inputs, dy)
    dim = case.shape[-1]
    rho = (dim + 2) / 2 * U + 4 * U
    for side in (0, 1):
        x, w, cos, sin = doubled(inputs, side)
        x.requires_grad_()
        weight = None if w is None else w.requires_grad_()
        y = forward_reference(x, weight, cos, sin, EPS, case.first)
        leaves = [x] if weight is None else [x, weight]
        expected = torch.autograd.grad(y, leaves, dy[side].double())
        with torch.no_grad():
            r = torch.ones_like(x[..., :1]) if weight is None else inverse_rms(x, EPS)
            n, factor = x * r, torch.ones(dim, dtype=x.dtype) if weight is None else weight
            compare(outputs[side], y, (rho + 4 * U) * turn_magnitudes(n * factor, cos, sin, case.first))
            a = turn_magnitudes(dy[side].double(), cos, sin, case.first, back=True)
            mean = (a * (factor * n).abs()).mean(-1, keepdim=True)
            dx, dw = gradients[side], gradients[2 + side]
            assert dx is not None
            bound = r * ((rho + 5 * U) * a * factor.abs() + (3 * rho + (dim + 10) * U) * n.abs() * mean)
            compare(dx, expected[0], bound)
            assert (dw is None) == (weight is None)
            if dw is not None:
                summands = x[..., 0].numel()
                compare(dw, expected[1], (rho + (4 + summands) * U) * (a * n.abs()).sum((0, 1, 2)))


@CASED
@DTYPES
def test_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    check(case, make(case, dtype), dtype)


@DTYPES
def test_heads_of_extreme_sizes(dtype: torch.dtype) -> None:
    """Far from zero, far below √eps, zero and huge: the norm loses no digits to any of them."""
    case = Case((1, 2, 3, 16))
    inputs = make(case, dtype)
    scales = torch.tensor([1e-20, 1e-4, 0.0, 1.0, 1e4, 1e15]).view(1, 2, 3, 1)
    offsets = torch.tensor([0.0, 0.0, 0.0, 1e4, 0.0, 0.0]).view(1, 2, 3, 1)
    q, k = ((x * scales + offsets).to(dtype) for x in inputs[:2])
    check(case, inputs._replace(q=q, k=k), dtype)


def test_what_is_not_finite_stays_in_its_head() -> None:
    """As in torch; so is a head whose squares overflow, which becomes zero."""
    case = Case((1, 2, 3, 8))
    inputs, dy = make(case, torch.float32), gradients_of(case, torch.float32)
    clean, (clean_dq, *_) = run(case, inputs, dy)
    q = inputs.q.detach().clone()
    q[0, 0, 1, 2], q[0, 1, 0, 5], q[0, 1, 2, 0] = torch.nan, torch.inf, 1e20
    (y, other), (dq, _, dw, _) = run(case, inputs._replace(q=q), dy)
    assert y[0, 0, 1].isnan().all()
    assert y[0, 1, 0].isnan().nonzero().flatten().tolist() == [4, 5]  # its pair
    assert not y[0, 1, 0, [0, 1, 2, 3, 6, 7]].any()
    assert not y[0, 1, 2].any()
    touched = torch.zeros(1, 2, 3, dtype=torch.bool)
    touched[0, 0, 1] = touched[0, 1, 0] = touched[0, 1, 2] = True
    assert dq is not None and clean_dq is not None and dw is not None
    assert torch.equal(y[~touched], clean[0][~touched])
    assert torch.equal(dq[~touched], clean_dq[~touched])
    assert torch.equal(other, clean[1])
    assert dq[0, 0, 1].isnan().all() and dq[0, 1, 0].isnan().any() and dw.isnan().all()


def test_no_eps() -> None:
    """r of a head that is not there, in a tile's tail, is infinite then, and nobody notices."""
    case = Case((1, 2, 3, 8))
    leaves = make(case, torch.float32).leaves()
    y, _ = qk_norm_rope(*leaves, 0.0)
    y.square().sum().backward()
    assert all(x is not None and x.grad is not None and x.grad.isfinite().all() for x in leaves[:4])


@DTYPES
def test_the_same_bits(dtype: torch.dtype) -> None:
    """Twice, for a part of the batch, and for text and image tokens apart."""
    case = Case((2, 6, 9, 16))
    inputs, dy = make(case, dtype), gradients_of(case, dtype)
    outputs, gradients = run(case, inputs, dy)
    again, gradients_again = run(case, inputs, dy)
    for one, other in zip([*outputs, *gradients], [*again, *gradients_again], strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    alone = qk_norm_rope(inputs.q[1:], inputs.k[1:], *inputs[2:], EPS)
    text = qk_norm_rope(inputs.q[:, :2], inputs.k[:, :2], *inputs[2:], EPS)
    image = qk_norm_rope(inputs.q[:, 2:], inputs.k[:, 2:], *inputs[2:], EPS, first=2)
    for side in (0, 1):
        assert torch.equal(alone[side], outputs[side][1:])
        assert torch.equal(torch.cat([text[side], image[side]], dim=1), outputs[side])


def test_q_and_k_of_other_strides_and_unequal_ones() -> None:
    """Heads before tokens, or numbers that do not lie side by side: copied first where the kernels cannot read them."""
    case = Case((1, 2, 3, 8))
    inputs = make(case, torch.float32)
    expected = qk_norm_rope(*inputs, EPS)
    swapped = inputs.q.transpose(1, 2).contiguous().transpose(1, 2)
    scattered = inputs.k.transpose(1, 3).contiguous().transpose(1, 3)
    for q, k in ((swapped, inputs.k), (swapped, scattered), (inputs.q, scattered)):
        for one, other in zip(qk_norm_rope(q, k, *inputs[2:], EPS), expected, strict=True):
            assert torch.equal(one, other) and one.is_contiguous()


@pytest.mark.skipif(not INTERPRETED, reason="it is a kernel's: run with TRITON_INTERPRET=1")
def test_many_partial_sums() -> None:
    """More than are read at once, 1024: integers, so the sums are exact."""
    programs, dim = 2100, 20
    partials = torch.arange(2 * programs * dim, dtype=torch.float32).view(2, programs, dim) % 251
    dw = torch.zeros(2, dim)
    for given in ((dw[0], dw[1]), (dw[0], None), (None, dw[1])):
        dw.zero_()
        qk_norm_rope_backward.weights_kernel[(-(-dim // qk_norm_rope_backward.COLUMNS), 2)](
            partials, *given, programs, DIM=dim, ROWS=qk_norm_rope_backward.ROWS, COLUMNS=qk_norm_rope_backward.COLUMNS
        )
        for side in (0, 1):
            wanted = partials[side].sum(0) if given[side] is not None else torch.zeros(dim)
            assert torch.equal(dw[side], wanted)


@pytest.mark.skipif(not INTERPRETED, reason="it is about the kernels: run with TRITON_INTERPRET=1")
def test_the_kernels_are_what_runs() -> None:
    assert heads.runs_triton(torch.zeros(1, 1, 1, 8)) and not heads.runs_triton(torch.zeros(1, 1, 1, 8).double())
