"""Leap prediction under Triton's interpreter, against float64. Run by tests/kernels/leap/test_prediction.py.

Bounds, with u = 2^-24 and every intermediate in float32. A prediction x - s v rounds the width s, the product and the
difference: off by at most e = u (2 |s v| + |x - s v|), and by an eps of bfloat16 more where it is stored in that: the
interpreter truncates there, a GPU rounds to nearest. A distance is the mean of |y - prediction|: e and one rounding of
the difference an element, then the additions on the longest path to the sum. 1024 numbers in a tree or in numpy's way
(8 accumulators of at most 16, 3 levels, 3 more above 128) are at most 21 additions, once in a tile and once over the
partials, of which there may be several rounds; the division is off by 2 u on a GPU. The weight w = 1 / (a + b) is off
by w (w (da + db) + 3 u). Second-order terms: 1% more.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import Tensor

from leapalign.kernels.leap import prediction as module
from leapalign.kernels.leap.prediction import leap_distance, predict

# Any: they are called with unpacked tuples
leap: Any = module.leap
leap_distances: Any = module.leap_distances
leap_reference: Any = module.leap_reference

U = 2.0**-24
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
}


def inputs(
    shape: tuple[int, ...], kind: str, seed: int, offset: float = 0.0
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(x_k, v_k, x_j, v_j, x_0), k, j; the velocities are slices of one tensor, as a rollout keeps them."""
    latents, velocities = DTYPES[kind]
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, *shape, generator=generator) + offset).to(latents)
    v = torch.randn(shape[0], 2, *shape[1:], generator=generator).to(velocities)
    levels = torch.rand(2, shape[0], generator=generator).sort(dim=0, descending=True).values
    return (x[0], v[:, 0], x[1], v[:, 1], x[2]), levels[0], levels[1]


def prediction_error(x: Tensor, v: Tensor, width: Tensor) -> Tensor:
    """e of the docstring, in float64."""
    product = (width.double()[:, None] * v.double().flatten(1)).reshape(x.shape)
    return U * (2 * product.abs() + (x.double() - product).abs())


def check(tensors: tuple[Tensor, ...], k: Tensor, j: Tensor, tau: float) -> None:
    found = leap(*tensors, k, j, tau)
    expected = leap_reference(*(x.double() for x in tensors), k.double(), j.double(), tau)
    x_k, v_k, x_j, v_j, x_0 = tensors
    tiles = -(-math.prod(x_k.shape[1:]) // module.TILE)
    rounds = -(-tiles // module.PARTIALS)
    errors = []
    for prediction, distance, exact, mean, x, v, width, real in (
        (found.x_jk, found.d_j, expected.x_jk, expected.d_j, x_k, v_k, k.double() - j.double(), x_j),
        (found.x_0j, found.d_0, expected.x_0j, expected.d_0, x_j, v_j, j.double(), x_0),
    ):
        assert prediction.dtype == x.dtype and distance.dtype == torch.float32
        e = prediction_error(x, v, width)
        stored = 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
        assert ((prediction.double() - exact).abs() <= 1.01 * (e + stored * (exact.abs() + e))).all()
        bound = 1.01 * ((e + U * (real.double() - exact).abs()).flatten(1).mean(1) + (2 * 21 + rounds + 2) * U * mean)
        assert ((distance.double() - mean).abs() <= bound).all()
        errors.append(bound)
    w = expected.weights
    assert ((found.weights.double() - w).abs() <= 1.01 * w * (w * (errors[0] + errors[1]) + 3 * U)).all()
    for value, same in zip(found[2:], leap_distances(*tensors, k, j, tau), strict=True):
        assert torch.equal(value, same)  # stored or not: the same sums
    assert torch.equal(found.d_j, leap_distance(x_k, v_k, x_j, k, j))


@budget(max_examples=10)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 60), st.sampled_from([1, 5, 16, 64])),
    kind=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 1e4, -1e-30]),
    tau=st.sampled_from([0.1, 10.0]),
)
def test_against_float64(shape: tuple[int, ...], kind: str, seed: int, offset: float, tau: float) -> None:
    check(*inputs(shape, kind, seed, offset), tau)


@pytest.mark.parametrize("num", [1, 15, 1023, 1024, 1025, 4096])
def test_ends_of_tiles(num: int) -> None:
    check(*inputs((2, num), "fp32", num), 0.1)


def test_many_rounds_of_partials(monkeypatch: pytest.MonkeyPatch) -> None:
    """More partials than the second stage reads at once; the bound counts its rounds."""
    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(module, "PARTIALS", 4)
    check(*inputs((2, 16 * 13 + 3), "fp32", 7), 0.1)


def test_layouts() -> None:
    """Samples that are not contiguous, and levels that are a column."""
    tensors, k, j = inputs((3, 6, 8), "fp32", 9)
    expected = leap(*tensors, k, j, 0.1)
    levels = torch.stack([k, j], dim=1)
    transposed = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    assert not transposed[0].is_contiguous()
    found = leap(*transposed, levels[:, 0], levels[:, 1], 0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_same_bits_twice_and_in_any_batch() -> None:
    tensors, k, j = inputs((3, 3000), "fp32", 11)
    found, again = leap(*tensors, k, j, 0.1), leap(*tensors, k, j, 0.1)
    alone = leap(*(x[1:2] for x in tensors), k[1:2], j[1:2], 0.1)
    for value, same, one in zip(found, again, alone, strict=True):
        assert torch.equal(value, same) and torch.equal(value[1:2], one)


def test_nan_and_inf_stay_in_their_sample() -> None:
    tensors, k, j = inputs((3, 1500), "fp32", 12)
    clean = leap(*tensors, k, j, 0.1)
    tensors[1][0, 1499] = math.nan  # v_k
    tensors[4][1, 3] = math.inf  # x_0
    found = leap(*tensors, k, j, 0.1)
    assert found.d_j[0].isnan() and found.weights[0].isnan() and found.x_jk[0].isnan().sum() == 1
    assert found.d_0[1] == math.inf and found.weights[1] == 0
    assert torch.equal(found.d_j[1:], clean.d_j[1:]) and torch.equal(found.d_0[[0, 2]], clean.d_0[[0, 2]])
    assert found.weights[2] == clean.weights[2]


@pytest.mark.parametrize("kind", list(DTYPES))
def test_backward(kind: str) -> None:
    """Of the predictions, against float64 autograd: dx is g itself; -(k - j) g rounds the width, the product and to
    the velocity's dtype."""
    tensors, k, j = inputs((2, 1030), kind, 13)
    leaves = [x.clone().requires_grad_() for x in tensors[:4]]
    found = leap(*leaves, tensors[4], k, j, 0.1)
    assert not found.d_j.requires_grad and not found.weights.requires_grad
    cotangents = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x) for i, x in enumerate(found[:2])
    ]
    grads = torch.autograd.grad(found[:2], leaves, cotangents)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    x_k, v_k, x_j, v_j = exact
    outputs = predict(x_k, v_k, k.double() - j.double()), predict(x_j, v_j, j.double())
    expected = torch.autograd.grad(outputs, exact, [c.double() for c in cotangents])
    for gradient, reference, leaf in zip(grads, expected, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        relative = 2 * U + torch.finfo(leaf.dtype).eps / 2
        assert ((gradient.double() - reference).abs() <= 1.01 * relative * reference.abs()).all()
    assert torch.equal(grads[0], cotangents[0]) and torch.equal(grads[2], cotangents[1])
