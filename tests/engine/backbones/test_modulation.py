"""Hoisted modulation: the norms compute what diffusers' do, and the factored gradient is the linear's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from leapalign.engine.backbones.modulation import OuterProduct, hoist_modulation

DIM, BATCH, TOKENS = 8, 3, 5
EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def products(draw: st.DrawFn) -> OuterProduct:
    """Factors of every small shape, none included, whose outer products may nearly cancel."""
    rows, out, columns = draw(st.integers(0, 6)), draw(st.integers(0, 9)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**16))
    left, right = normal(rows, out, seed=seed), normal(rows, columns, seed=seed + 1)
    if rows > 1 and draw(st.booleans()):
        left[-1], right[-1] = -left[0], right[0] * (1 + draw(st.sampled_from([0.0, 1e-9])))
    return OuterProduct(left, right)


def rounding(product: OuterProduct) -> float:
    """Bound for the difference of two ways to sum R products of `out` and `in` elements each, squared."""
    left, right = product.left, product.right
    terms = left.shape[0] ** 2 + left.shape[1] + right.shape[1]
    return 4 * terms * EPS * float(left.square().sum() * right.square().sum())


@given(product=products(), extra=st.integers(0, 40))
def test_tiles_cover_the_product_once(product: OuterProduct, extra: int) -> None:
    out, columns = product.shape
    limit = columns + extra
    whole = torch.full((out, columns), torch.nan, dtype=torch.float64)
    end = 0
    for rows, tile in product.tiles(limit, torch.float64):
        assert rows.start == end < rows.stop and tile.numel() <= limit
        whole[rows], end = tile, rows.stop
    assert end == out
    expected = sum((torch.outer(a, b) for a, b in zip(product.left, product.right, strict=True)), torch.zeros(1, 1))
    torch.testing.assert_close(whole, expected.expand(out, columns), rtol=1e-13, atol=1e-13, check_dtype=False)
    assert torch.equal(product.expand(torch.float64), product.left.T @ product.right)


@given(product=products())
def test_the_norm_needs_no_product(product: OuterProduct) -> None:
    expected = float(product.expand(torch.float64).square().sum())
    found = product.square_sum()
    assert found.shape == () and found.dtype == torch.float64 and found >= 0
    assert abs(float(found) - expected) <= rounding(product)


def test_products_are_float32_whatever_the_factors() -> None:
    """bfloat16 factors are exact in float32; their product in bfloat16 would not be."""
    product = OuterProduct(normal(4, 6, dtype=torch.bfloat16), normal(4, 3, seed=1, dtype=torch.bfloat16))
    exact = product.left.double().T @ product.right.double()
    assert product.expand().dtype == torch.float32 and product.shape == (6, 3)
    torch.testing.assert_close(product.expand().double(), exact, rtol=1e-5, atol=1e-6)
    assert all(tile.dtype == torch.float32 for _, tile in product.tiles(3))
    torch.testing.assert_close(product.square_sum(), exact.square().sum(), rtol=1e-13, atol=0)


def test_a_norm_that_is_not_finite_stays_so() -> None:
    product = OuterProduct(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
    assert product.square_sum().isnan()


def test_it_is_the_gradient_of_a_linear() -> None:
    linear, x, cotangent = nn.Linear(4, 6).double(), normal(BATCH, 4), normal(BATCH, 6, seed=1)
    (expected,) = torch.autograd.grad(linear(x), [linear.weight], cotangent)
    torch.testing.assert_close(OuterProduct(cotangent, x).expand(torch.float64), expected, rtol=1e-13, atol=1e-13)


def test_a_tile_holds_a_row_at_least() -> None:
    with pytest.raises(ValueError, match="max_elements=3 holds no row of the gradient: give at least 4"):
        next(OuterProduct(normal(2, 6), normal(2, 4)).tiles(3))


NORMS: dict[str, Any] = {
    "zero": lambda: AdaLayerNormZero(DIM),
    "single": lambda: AdaLayerNormZeroSingle(DIM),
    "dual": lambda: SD35AdaLayerNormZeroX(DIM),
    "continuous": lambda: AdaLayerNormContinuous(DIM, DIM, elementwise_affine=False, eps=1e-6),
    "continuous, affine": lambda: AdaLayerNormContinuous(DIM, DIM, norm_type="rms_norm"),
}


@pytest.mark.parametrize("kind", NORMS)
def test_a_hoisted_norm_computes_the_same_bits(kind: str) -> None:
    """From its own columns of a condition that holds another norm's first."""
    torch.manual_seed(0)
    norm, first = NORMS[kind]().double(), AdaLayerNormZero(DIM).double()
    x, temb = normal(BATCH, TOKENS, DIM), normal(BATCH, DIM, seed=1)
    expected = norm(x, temb) if "continuous" in kind else norm(x, emb=temb)
    condition = torch.cat([linear(nn.functional.silu(temb)) for linear in (first.linear, norm.linear)], dim=1)

    block: Any = nn.Module()
    block.first, block.norm = first, norm
    assert hoist_modulation(block, ("first", "norm")) == ("first.linear", "norm.linear")
    found = block.norm(x, condition) if "continuous" in kind else block.norm(x, emb=condition)
    if isinstance(expected, Tensor):
        expected, found = (expected,), (found,)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any("linear" in name for name, _ in block.norm.named_parameters())


class Adapter(nn.Linear):
    pass


@pytest.mark.parametrize("broken", ["class", "linear", "labels"])
def test_a_norm_that_is_not_plain_is_refused(broken: str) -> None:
    block: Any = nn.Module()
    block.norm1 = AdaLayerNormZero(DIM, num_embeddings=4 if broken == "labels" else None)
    if broken == "class":
        block.norm1 = nn.LayerNorm(DIM)
    elif broken == "linear":
        block.norm1.linear = Adapter(DIM, 6 * DIM)
    with pytest.raises(ValueError, match=r"norm1 of Module is a \w+ that cannot be hoisted.*pass hoist=False"):
        hoist_modulation(block, ("norm1",))
