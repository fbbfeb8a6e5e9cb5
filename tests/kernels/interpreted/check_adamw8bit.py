"""The Triton step equals the definition in torch bit for bit: run under the interpreter by test_adamw8bit_triton.py.

Nothing here has a tolerance, except the sum of squares of outer products.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import leapalign.kernels.sum_of_squares as squares
from leapalign.kernels import dispatch
from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit import kernel as adamw8bit_kernel
from leapalign.kernels.adamw8bit.definition import AVERAGE_STREAM, Hyper
from leapalign.kernels.adamw8bit.device import expand, update_outer, update_triton
from leapalign.kernels.adamw8bit.kernel import BLOCKS
from leapalign.kernels.adamw8bit.quantize import BLOCK, blocks_of, boundaries, signed_map, unsigned_map
from leapalign.kernels.host import native as host
from leapalign.kernels.rounding import ROUNDS, random_draws, round_with_draws
from leapalign.kernels.sum_of_squares import CHUNK, sum_of_squares, sum_of_squares_outer

HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=7)
FORMATS = ["float32", "bfloat16", "residual", "master"]
AVERAGES = [None, torch.float32, torch.bfloat16]
COUNT = BLOCKS * BLOCK + 3 * BLOCK + 31  # a whole tile, three blocks of the next and a short one
OPTIONS: dict[str, Any] = {"hp": HYPER, "seed": 2**63 + 12345678901, "parameter": 2**31 + 5, "ema_decay": 0.9}


def test_the_interpreter_runs_it() -> None:
    assert dispatch.INTERPRETED


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def gradients(kind: str, count: int, seed: int) -> Tensor:
    """Gradients of several sizes in a block; some runs with zeros and subnormals."""
    g = randn(count, seed)
    if kind == "heavy tails":
        return g * randn(count, seed + 1).mul(4).exp()
    if kind == "zero blocks":
        return g * (torch.arange(count) // BLOCK % 2)
    if kind == "subnormal":
        return g * 1e-40
    if kind == "small":  # squares underflow, peaks lie about 2^-126
        return g * 3e-37 * randn(count, seed + 1).mul(2).exp()
    if kind == "large":  # squares overflow in some
        return g * 1e19
    return g


def tensors_of(weights: str, average: torch.dtype | None, count: int, kind: str = "normal") -> dict[str, Any]:
    """The arguments of a run after three steps with gradients of that kind."""
    codes, absmax = torch.zeros(count, dtype=torch.uint8), torch.zeros(blocks_of(count))
    moments = (codes, absmax, codes.clone(), absmax.clone())
    for step in range(1, 4):
        hp = dataclasses.replace(HYPER, step=step)
        adamw8bit.update(torch.zeros(count), gradients(kind, count, step), *moments, hp, seed=0, parameter=0)
    tensors: dict[str, Any] = dict(zip(("codes_m", "absmax_m", "codes_v", "absmax_v"), moments, strict=True))
    w = randn(count, 50)
    tensors["weights"] = w.clone() if weights == "float32" else w.bfloat16()
    if weights == "residual":
        tensors["residual"] = torch.empty(count, dtype=torch.int8)
        adamw8bit.split_residual(w, tensors["weights"], tensors["residual"])
    if weights == "master":
        tensors["master"] = w
    if average is not None:
        tensors["ema"] = randn(count, 51).to(average)
    return tensors


def copied(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ; any nan is as good as another."""

    def same(x: Tensor, y: Tensor) -> bool:
        if x.is_floating_point():
            assert torch.equal(x.isnan(), y.isnan())
            x, y = x.nan_to_num(0, math.inf, -math.inf), y.nan_to_num(0, math.inf, -math.inf)
        return torch.equal(x.view(torch.uint8), y.view(torch.uint8))

    return [name for name in a if not same(a[name], b[name])]


@pytest.mark.parametrize(("weights", "average"), list(itertools.product(FORMATS, AVERAGES)))
def test_every_format(weights: str, average: torch.dtype | None) -> None:
    theirs = tensors_of(weights, average, COUNT)
    ours, g = copied(theirs), randn(COUNT, 5)
    if weights == "master":
        ours["weights"].fill_(math.nan)  # not read
    options = OPTIONS | {"first": BLOCK * (2**24 + 3), "scale": 0.7}
    adamw8bit.update(gradient=g, **theirs, **options)
    update_triton(gradient=g, **ours, **options)
    assert not differing(theirs, ours)


@pytest.mark.parametrize("kind", ["heavy tails", "zero blocks", "subnormal", "small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_all_sizes(kind: str, dtype: torch.dtype) -> None:
    """Two steps; β2 of 0.9 lets v follow."""
    theirs = tensors_of("bfloat16", torch.bfloat16, COUNT, kind)
    ours = copied(theirs)
    for step in (4, 5):
        g = gradients(kind, COUNT, 10 + step).to(dtype)
        options = OPTIONS | {"hp": dataclasses.replace(HYPER, beta2=0.9, step=step)}
        adamw8bit.update(gradient=g, **theirs, **options)
        update_triton(gradient=g, **ours, **options)
        assert not differing(theirs, ours)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, BLOCKS * BLOCK + BLOCK + 1))
@example(count=BLOCK)
@example(count=BLOCKS * BLOCK)
@example(count=BLOCKS * BLOCK + 1)
def test_tails(count: int) -> None:
    theirs = tensors_of("residual", torch.float32, count)
    padded = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in copied(theirs).items()}
    ours: dict[str, Any] = {name: tensor[:-1] for name, tensor in padded.items()}
    after = {name: tensor[-1:].clone() for name, tensor in padded.items()}
    g = randn(count, 6)
    adamw8bit.update(gradient=g, **theirs, **OPTIONS)
    update_triton(gradient=g, **ours, **OPTIONS)
    assert not differing(theirs, ours)
    assert not differing(after, {name: tensor[-1:] for name, tensor in padded.items()})


@pytest.mark.parametrize("cuts", [(1,), (8,), (3, 4, 10), (11,)])
def test_the_bits_do_not_depend_on_how_a_parameter_is_cut(cuts: tuple[int, ...]) -> None:
    whole, g = tensors_of("bfloat16", torch.bfloat16, COUNT), randn(COUNT, 7)
    pieces = copied(whole)
    update_triton(gradient=g, **whole, **OPTIONS)
    for first, end in itertools.pairwise([0, *(BLOCK * cut for cut in cuts), COUNT]):
        part, blocks = slice(first, end), slice(first // BLOCK, blocks_of(end))
        views: dict[str, Any] = {
            name: tensor[blocks if name.startswith("absmax") else part] for name, tensor in pieces.items()
        }
        update_triton(gradient=g[part], **views, **OPTIONS, first=first)
    assert not differing(whole, pieces)


def test_every_code_at_its_boundaries() -> None:
    """With β1 = β2 = 0 and no state, m is g and √v is |g|: both sides of all boundaries, with peaks of both signs."""
    edges = torch.cat([boundaries(signed_map()), boundaries(unsigned_map())])
    below, above = (torch.nextafter(edges, torch.full_like(edges, end)) for end in (-math.inf, math.inf))
    sizes = 10 ** (8 * torch.rand(20_000, generator=torch.Generator().manual_seed(8)) - 8)
    values = torch.cat([edges, below, above, signed_map(), unsigned_map(), sizes, torch.tensor([0.0, -0.0])])
    values = torch.cat([values, -values])
    values = torch.nn.functional.pad(values, (0, -len(values) % (BLOCK - 1))).view(-1, BLOCK - 1)
    peaks = torch.tensor([1.0, -1.0]).repeat(len(values))[: len(values), None]
    g = torch.cat([peaks, values.clamp(-1, 1)], dim=1).flatten()
    theirs: dict[str, Any] = {name: tensor.zero_() for name, tensor in tensors_of("float32", None, len(g)).items()}
    ours = copied(theirs)
    hp = dataclasses.replace(HYPER, beta1=0.0, beta2=0.0)
    for scale in (1.0, 3e-3):  # the second rounds y
        adamw8bit.update(gradient=g, **theirs, **OPTIONS | {"hp": hp, "scale": scale})
        update_triton(gradient=g, **ours, **OPTIONS | {"hp": hp, "scale": scale})
        assert not differing(theirs, ours)
        assert len(theirs["codes_m"].unique()) == 256 and len(theirs["codes_v"].unique()) == 255


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("weights", FORMATS)
def test_a_bad_gradient_spoils_its_block_as_in_the_definition(bad: float, weights: str) -> None:
    theirs, g = tensors_of(weights, torch.bfloat16, COUNT), randn(COUNT, 9)
    g[2 * BLOCK + 7] = bad
    g[COUNT - 1] = bad
    ours = copied(theirs)
    adamw8bit.update(gradient=g, **theirs, **OPTIONS)
    update_triton(gradient=g, **ours, **OPTIONS)
    assert not differing(theirs, ours)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, None])
def test_a_guard_that_is_not_finite_leaves_everything(bad: float | None) -> None:
    tensors, g = tensors_of("bfloat16", torch.float32, COUNT), randn(COUNT, 10)
    before = copied(tensors)
    if bad is not None:
        g[77] = bad
    update_triton(gradient=g, **tensors, **OPTIONS, guard=sum_of_squares(g))
    assert len(differing(before, tensors)) == (0 if bad is not None else 6)


@pytest.mark.parametrize("cols", [BLOCK, 3 * BLOCK, 200, 7])
@pytest.mark.parametrize(("terms", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (5, torch.float32)])
def test_outer_products_are_the_gradient_that_they_sum_to(cols: int, terms: int, dtype: torch.dtype) -> None:
    rows = 13
    left, right = randn(terms * rows, 11).view(terms, rows).to(dtype), randn(terms * cols, 12).view(terms, cols)
    right = right.to(dtype)
    theirs = tensors_of("bfloat16", torch.bfloat16, rows * cols)
    ours = copied(theirs)
    options = OPTIONS | {"first": 5 * BLOCK, "scale": 0.3}
    adamw8bit.update(gradient=expand(left, right).view(-1), **theirs, **options)
    weights = ours.pop("weights").view(rows, cols)
    update_outer(weights, left, right, **ours, **options)
    assert not differing(theirs, ours | {"weights": weights.view(-1)})


@triton.jit
def round_kernel(
    x_ptr,  # (n,) fp32
    draws_ptr,  # (n,) i32
    out_ptr,  # (n,) i32
    SIZE: tl.constexpr,
) -> None:
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    rounded = adamw8bit_kernel._round(tl.load(x_ptr + index), tl.load(draws_ptr + index))
    tl.store(out_ptr + index, rounded)


def test_rounding_with_all_draws() -> None:
    """65,536 draws each of ordinary, subnormal, largest and special values."""
    special = [0.0, 1.0, 1.1, 1e-45, 1e-39, 1.17e-38, 3.3895e38, 3.4028234e38, math.inf, math.nan, 65535.9]
    x = torch.cat([torch.tensor(special), randn(8, 13) * 1e-3])
    x = torch.cat([x, -x])
    draws = torch.arange(2**16, dtype=torch.int32)
    flat, each = x.repeat_interleave(2**16), draws.repeat(len(x))
    out = torch.empty_like(each)
    round_kernel[(len(x),)](flat, each, out, SIZE=2**16)
    expected = round_with_draws(x[:, None], draws).view(-1)
    assert torch.equal(out.to(torch.int16), expected.view(torch.int16))


@triton.jit
def draws_kernel(
    block_ptr,  # (1,) i64
    out_ptr,  # (8, 256) i32
    seed_low,
    seed_high,
    parameter,
    step,
    ROUNDS: tl.constexpr,
) -> None:
    block = tl.load(block_ptr) + tl.arange(0, 8).to(tl.int64)[:, None] * 32
    draws = adamw8bit_kernel._draws(block, seed_low, seed_high, parameter, step, ROUNDS)
    tl.store(out_ptr + tl.arange(0, 8)[:, None] * 256 + tl.arange(0, 256)[None, :], draws)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("first", [0, BLOCK, 2**35 - BLOCK, AVERAGE_STREAM + 2**34])
def test_draws(seed: int, first: int) -> None:
    signed = adamw8bit_kernel._signed
    for parameter, step in ((0, 1), (2**32 - 1, 2**31), (7, 2**32 - 1)):
        out = torch.empty(8, 256, dtype=torch.int32)
        words = [signed(word) for word in (seed & 0xFFFFFFFF, seed >> 32, parameter, step)]
        draws_kernel[(1,)](torch.tensor([first // 8]), out, *words, ROUNDS=ROUNDS)
        assert torch.equal(out.view(-1), random_draws(seed, step, parameter, offset=first, count=8 * 256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 1000, CHUNK, CHUNK * 5 + 17, CHUNK * squares.CHUNKS + 1])
def test_sum_of_squares_has_the_bits_of_the_host(count: int, dtype: torch.dtype) -> None:
    x = (randn(count, 14).mul(3).exp() * randn(count, 15)).to(dtype)
    total = sum_of_squares(x)
    assert total.shape == () and total.dtype == torch.float64
    assert total.item() == host.sum_of_squares(x)


def test_squares_of_subnormal_numbers() -> None:
    x = torch.arange(1, 301, dtype=torch.int16).view(torch.bfloat16)
    assert sum_of_squares(x).item() == host.sum_of_squares(x) > 0


def test_sums_are_added_until_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "FAN", 2)
    monkeypatch.setattr(squares, "CHUNKS", 1)
    x = randn(CHUNK * 4 + 6, 16)  # 5 sums, then 3, 2 and 1
    assert sum_of_squares(x).item() == host.sum_of_squares(x)


def test_sum_of_squares_is_finite_exactly_if_all_are() -> None:
    x = torch.full((CHUNK + 5,), torch.finfo(torch.float32).max)
    assert sum_of_squares(x).isfinite()
    for bad in (math.inf, -math.inf, math.nan):
        for place in (0, CHUNK - 1, CHUNK + 4):
            broken = x.clone()
            broken[place] = bad
            assert not sum_of_squares(broken).isfinite()
    assert sum_of_squares(x[:0]) == 0


def test_sum_of_squares_of_outer_products() -> None:
    """Against the matrix in double: 2 (rows + cols + terms²) roundings, relative to the terms' magnitudes."""
    left, right = randn(3 * 40, 16).view(3, 40), randn(3 * 70, 17).view(3, 70)
    exact = (left.double().T @ right.double()).square().sum()
    sizes = (left.double().abs().T @ right.double().abs()).square().sum()
    assert (sum_of_squares_outer(left, right) - exact).abs() <= 2 * (40 + 70 + 9) * 2.0**-53 * sizes
    assert sum_of_squares_outer(left[:0], right[:0]) == 0
    for bad in (math.inf, math.nan, 1e38):
        broken = left * 1.0
        broken[1, 2] = bad
        assert not sum_of_squares_outer(broken, right * 100).isfinite()
