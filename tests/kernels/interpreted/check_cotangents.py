"""The cotangents' and connectors' kernels under Triton's interpreter. Run by tests/kernels/leap/test_cotangents.py.

Bounds, with u = 2^-24 and every intermediate in float32: -j g is one product. y = g + alpha u rounds alpha, the
product and the sum: off by e = u (2 |alpha u| + |y|), which is not relative to y where g and u cancel. c_k = (j - k) y
rounds the width and the product: |k - j| e + 2 u |c_k|. Where a bfloat16 is stored, the interpreter truncates (a GPU
rounds to nearest): a whole eps. Second-order terms: 1% more.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor

from leapalign.kernels.leap.connector import discount, leap_connector
from leapalign.kernels.leap.cotangents import (
    cotangent_and_carry,
    cotangent_j,
    cotangent_k,
    cotangents,
    cotangents_reference,
)

U = 2.0**-24
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
}


def inputs(shape: tuple[int, ...], kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, u, k, j."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=generator).to(DTYPES[kind][0])
    u = (torch.randn(shape, generator=generator) * 10).to(DTYPES[kind][1])
    levels = torch.rand(2, shape[0], generator=generator).sort(dim=0, descending=True).values
    return g, u, levels[0], levels[1]


def stored(dtype: torch.dtype) -> float:
    """An eps where a float32 number is truncated."""
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps


@budget(max_examples=12)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 60), st.sampled_from([1, 5, 16, 64])),
    kind=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**31),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    nested=st.booleans(),
)
def test_against_float64(shape: tuple[int, ...], kind: str, seed: int, alpha: float, nested: bool) -> None:
    g, given_u, k, j = inputs(shape, kind, seed)
    u = given_u if nested else None
    dtype = DTYPES[kind][1]
    c_j, c_k = cotangents(g, u, alpha, k, j, dtype=dtype)
    exact = cotangents_reference(
        g.double(), None if u is None else u.double(), alpha, k.double(), j.double(), torch.float64
    )
    added = torch.zeros_like(g).double() if u is None else alpha * u.double()
    e = U * (2 * added.abs() + exact[2].abs()) if nested else torch.zeros_like(added)
    width = (k.double() - j.double()).abs().reshape(-1, 1, 1)
    bounds = (
        (U + stored(dtype)) * exact[0].abs(),
        width * e + (2 * U + stored(dtype)) * exact[1].abs(),
        e + stored(g.dtype) * exact[2].abs(),
    )
    same, y = cotangent_and_carry(g, u, alpha, k, j, dtype=dtype)
    for value, reference, bound in zip((c_j, c_k, y), exact, bounds, strict=True):
        assert value.shape == g.shape
        assert ((value.double() - reference).abs() <= 1.01 * bound).all()
    assert (c_j.dtype, c_k.dtype, y.dtype) == (dtype, dtype, g.dtype)
    # every way to ask for it gives the same bits, and so does a sample alone
    assert torch.equal(same, c_k)
    assert torch.equal(cotangent_j(g, j, dtype=dtype), c_j)
    assert torch.equal(cotangent_k(g, u, alpha, k, j, dtype=dtype), c_k)
    if len(g):
        last = slice(len(g) - 1, None)
        alone = cotangents(g[last], None if u is None else u[last], alpha, k[last], j[last], dtype=dtype)
        assert torch.equal(alone[0], c_j[last]) and torch.equal(alone[1], c_k[last])


@pytest.mark.parametrize("num", [1, 15, 1023, 1024, 1025])
def test_ends_of_tiles(num: int) -> None:
    """Nothing is written past a sample: rows that neighbour each other keep apart."""
    g, u, k, j = inputs((3, num), "fp32", num)
    c_j, c_k = cotangents(g, u, 0.0, k, j)
    assert torch.equal(c_j, -j[:, None] * g) and torch.equal(c_k, (j - k)[:, None] * g)


def test_layouts_zeros_and_nan() -> None:
    """g from a transposed tensor and u from a slice; a sample with g = u = 0 keeps zeros, a nan stays where it is."""
    g, u, k, j = inputs((3, 8, 9), "fp32", 3)
    g[1], u[1] = 0, 0
    g[2, 0, 0], u[2, 1, 1] = math.nan, math.inf
    expected = cotangents(g, u, 0.3, k, j)
    found = cotangents(
        g.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([u, u], dim=1)[:, 1], 0.3, k, j
    )  # fmt: skip
    for value, same in zip(found, expected, strict=True):
        torch.testing.assert_close(value, same, rtol=0, atol=0, equal_nan=True)
        assert not value[1].any()
    assert found[0].isnan().sum() == 1 and found[1][2, 0, 0].isnan() and found[1][2, 1, 1] == -math.inf


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", list(DTYPES))
def test_connector(kind: str, nested: bool) -> None:
    """Values bit for bit; gradients against float64 autograd of the paper's expression, in the bounds above."""
    latents, velocities = DTYPES[kind]
    x_k, _, k, j = inputs((2, 7, 150), kind, 21)
    x_j, v_k = torch.flip(x_k, (1,)), (x_k * 0.7).to(velocities)
    g, u = inputs((2, 7, 150), kind, 22)[:2]
    u = u.to(latents)
    leaves = x_k.clone().requires_grad_(), v_k.clone().requires_grad_()
    latent, model_input, distance = leap_connector(*leaves, x_j, k, j, 0.3)
    assert torch.equal(latent, x_j) and torch.equal(model_input, x_j) and not distance.requires_grad
    outputs, arriving = ((latent, model_input), (g, u)) if nested else ((latent,), (g,))
    dx, dv = torch.autograd.grad(outputs, leaves, arriving)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    width = (k.double() - j.double()).reshape(-1, 1, 1)
    leap = exact[0] - width * exact[1]
    connected = leap + (x_j.double() - leap).detach()
    discounted = 0.3 * connected + 0.7 * connected.detach()
    found = (connected, discounted) if nested else (connected,)
    expected_x, expected_v = torch.autograd.grad(found, exact, [grad.double() for grad in arriving])
    e = U * (2 * 0.3 * u.double().abs() + expected_x.abs()) if nested else torch.zeros_like(expected_x)
    assert (dx.dtype, dv.dtype) == (latents, velocities)
    assert ((dx.double() - expected_x).abs() <= 1.01 * (e + stored(latents) * expected_x.abs())).all()
    bound = width * e + (2 * U + stored(velocities)) * expected_v.abs()
    assert ((dv.double() - expected_v).abs() <= 1.01 * bound).all()


def test_discount() -> None:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (dx,) = torch.autograd.grad(discount(x, 0.3), x, torch.ones(2, 5))
    assert torch.equal(discount(x, 0.3), x) and torch.equal(dx, torch.full((2, 5), 0.3))
