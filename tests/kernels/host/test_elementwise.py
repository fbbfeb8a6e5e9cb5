"""The host's sums, averages and copies against torch, bit for bit, for every instruction set and number of threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.kernels import rounding
from leapalign.kernels.adamw8bit.definition import AVERAGE_STREAM
from leapalign.kernels.host import native as host
from leapalign.kernels.pairwise_sum import sum_of_squares_reference
from tests.kernels.host.host_runs import GRADIENTS, every_isa, needs_native, randn, unequal

ISAS = st.sampled_from(host.instruction_sets() or ["scalar"])
SIZES = st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 4095, 4096, 4097, 3 * 4096 + 1]))
DTYPES = st.sampled_from([torch.bfloat16, torch.float32])
LARGE = 5 * 2**16 + 777  # a thread takes 2^16 elements at a time: six pieces


def any_bits(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(count,) of any bit patterns, with special values strewn among them."""
    integer = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    generator, limit = torch.Generator().manual_seed(seed), torch.iinfo(integer).max
    x = torch.randint(-limit - 1, limit + 1, (count,), generator=generator).to(integer).view(dtype)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 3.38e38, -3.38e38, math.inf, -math.inf, math.nan])
    places = torch.randint(0, max(count, 1), (count // 8,), generator=generator)
    x[places] = special[torch.arange(count // 8) % len(special)].to(dtype)
    return x


def same(a: Tensor, b: Tensor) -> bool:
    return not unequal(a, b).any()


# ---- accumulate ----------------------------------------------------------------------------------------------------


def added(total: Tensor, x: Tensor) -> Tensor:
    return (total.float() + x.float()).to(total.dtype)


@needs_native
@settings(max_examples=60)
@given(
    isa=ISAS,
    count=SIZES,
    to=DTYPES,
    of=DTYPES,
    threads=st.integers(1, 7),
    skipped=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_accumulate(
    isa: str, count: int, to: torch.dtype, of: torch.dtype, threads: int, skipped: int, seed: int
) -> None:
    """Any bits, nan and infinities too, in memory that is aligned to its elements and no more."""
    total, x = any_bits(count + skipped, to, seed)[skipped:], any_bits(count + skipped, of, seed + 1)[skipped:]
    expected, given_x = added(total, x), x.clone()
    with host.instruction_set(isa):
        host.accumulate(total, x, threads=threads).wait()
    assert same(total, expected) and same(x, given_x)


@every_isa
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32])
def test_sums_at_the_middle_are_rounded_to_even(isa: str, of: torch.dtype) -> None:
    """1 + k 2^-7 plus half a place, 2^-8, is in the middle for every k; with 2^-23 less or more it is not."""
    total = (1 + torch.arange(128) * 2**-7).bfloat16()
    below, tie, above = (torch.full((128,), 2**-8 + shift).to(of) for shift in (-(2.0**-23), 0.0, 2.0**-23))
    odd = torch.arange(128) % 2
    for x, up in ((below, 0 * odd), (tie, odd), (above, 0 * odd + 1)):
        if of == torch.bfloat16 and x is not tie:
            continue  # it does not have these numbers
        ours = total.clone()
        with host.instruction_set(isa):
            host.accumulate(ours, x).wait()
        assert torch.equal(ours.float(), total.float() + up * 2**-7)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accumulate_for_any_threads(isa: str, dtype: torch.dtype) -> None:
    start, x = randn(LARGE, seed=1).to(dtype), randn(LARGE, seed=2).bfloat16()
    expected = added(start, x)
    with host.instruction_set(isa):
        for threads in range(1, 8):
            total = start.clone()
            host.accumulate(total, x, threads=threads).wait()
            assert same(total, expected)


# ---- ema -----------------------------------------------------------------------------------------------------------


def averaged(
    average: Tensor, weights: Tensor, decay: float, first: int, *, seed: int, step: int, parameter: int
) -> Tensor:
    old = average.float()
    new = old + (weights.float() - old) * (1 - decay)
    if average.dtype == torch.float32:
        return new
    return rounding.round_stochastic(new, seed, step, parameter, offset=AVERAGE_STREAM + first)


@needs_native
@settings(max_examples=60)
@given(
    isa=ISAS,
    count=SIZES,
    to=DTYPES,
    of=DTYPES,
    threads=st.integers(1, 7),
    decay=st.sampled_from([0.0, 0.5, 0.999, 1 - 2.0**-53]),
    first=st.one_of(st.integers(0, 700), st.sampled_from([2**35 - 3, 2**60 + 1])),
    seed=st.integers(0, 2**64 - 1),
)
def test_ema(
    isa: str, count: int, to: torch.dtype, of: torch.dtype, threads: int, decay: float, first: int, seed: int
) -> None:
    average, weights = any_bits(count, to, seed % 999), any_bits(count, of, seed % 998)
    draws = {"seed": seed, "step": 7, "parameter": 2**32 - 1}
    expected = averaged(average, weights, decay, first, **draws)
    with host.instruction_set(isa):
        host.ema(average, weights, decay, **draws, first=first, threads=threads).wait()
    assert same(average, expected)


@every_isa
def test_ema_for_any_threads(isa: str) -> None:
    start, weights, draws = (
        randn(LARGE, seed=3).bfloat16(),
        randn(LARGE, seed=4),
        {"seed": 5, "step": 6, "parameter": 7},
    )
    expected = averaged(start, weights, 0.9, 11, **draws)
    with host.instruction_set(isa):
        for threads in range(1, 8):
            average = start.clone()
            host.ema(average, weights, 0.9, **draws, first=11, threads=threads).wait()
            assert same(average, expected)


# ---- sum of squares, rounding, copy --------------------------------------------------------------------------------


@needs_native
@settings(max_examples=60)
@given(isa=ISAS, count=SIZES, dtype=DTYPES, kind=st.sampled_from(list(GRADIENTS)), threads=st.integers(1, 7))
def test_sum_of_squares(isa: str, count: int, dtype: torch.dtype, kind: str, threads: int) -> None:
    x = GRADIENTS[kind](count + 1, count).to(dtype)[1:]
    with host.instruction_set(isa):
        assert host.sum_of_squares(x, threads=threads) == float(sum_of_squares_reference(x))


@every_isa
def test_large_sums_and_roundings_for_any_threads(isa: str) -> None:
    x = GRADIENTS["lognormal"](LARGE, 5)
    total, rounded = float(sum_of_squares_reference(x)), rounding.round_stochastic(x, 1, 2, 3, offset=5)
    with host.instruction_set(isa):
        for threads in range(1, 8):
            assert host.sum_of_squares(x, threads=threads) == total
            assert same(host.round_stochastic(x, 1, 2, 3, offset=5, threads=threads), rounded)


@needs_native
@pytest.mark.parametrize("count", [0, 1, 17, 4097, 3 * 2**20 + 5])  # a thread takes 2^20 bytes at a time
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64, torch.bool])
@pytest.mark.parametrize("threads", [1, 3])
def test_copy(count: int, dtype: torch.dtype, threads: int) -> None:
    source = (torch.arange(count + 1) % 251).to(dtype)[1:]
    around = torch.zeros(count + 2, dtype=dtype)
    host.copy(around[1:-1], source, threads=threads).wait()
    assert torch.equal(around[1:-1], source)
    assert not around[0] and not around[-1]


@needs_native
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 7)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x, average = randn(*shape, seed=6), torch.zeros(shape)
    total, to = x.clone(), torch.empty(shape)
    host.accumulate(total, x).wait()
    host.ema(average, x, 0.5).wait()
    host.copy(to, x).wait()
    assert torch.equal(total, 2 * x) and torch.equal(average, x / 2) and torch.equal(to, x)


# ---- without the native module, and refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32])
def test_the_fallback_gives_the_same_bits(to: torch.dtype, of: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "native", None)
    monkeypatch.setattr(host, "_say_once", lambda: None)
    monkeypatch.setattr(host, "SLAB", 300)  # several
    x, draws = any_bits(1000, of, 7), {"seed": 5, "step": 6, "parameter": 7}
    total, average, copy = any_bits(1000, to, 8), any_bits(1000, to, 9), torch.empty(1000, dtype=of)
    expected = added(total, x), averaged(average, x, 0.9, 11, **draws)
    host.accumulate(total, x).wait()
    host.ema(average, x, 0.9, **draws, first=11).wait()
    host.copy(copy, x).wait()
    assert same(total, expected[0]) and same(average, expected[1]) and same(copy, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: host.accumulate(x, x.double()), "accumulate takes two contiguous tensors of one shape"),
        (lambda x: host.accumulate(x, x[:3]), r"float32 \(6,\) .* and torch.float32 \(3,\)"),
        (lambda x: host.accumulate(x[::2], x[:3]), r"with strides \(2,\)"),
        (lambda x: host.accumulate(x, x.to("meta")), "x is on meta"),
        (lambda x: host.ema(x.int(), x, 0.5), "ema takes"),
        (lambda x: host.ema(x, x.clone(), 1.0), r"decay=1.0 must be in \[0, 1\)"),
        (lambda x: host.ema(x, x.clone(), math.nan), r"decay=nan must be in \[0, 1\)"),
        (lambda x: host.ema(x, x.clone(), 0.5, first=-1), "offset is -1"),
        (lambda x: host.ema(x, x.clone(), 0.5, first=2**61), r"offset \+ number of elements"),
        (lambda x: host.copy(x, x.bfloat16()), "copy takes"),
        (lambda x: host.copy(x.view(2, 3).T, x.view(3, 2)), "copy takes"),
        (lambda x: host.copy(x[1:], x[:-1]), "copy: two of the tensors share memory"),
        (lambda x: host.accumulate(x, x), "accumulate: two of the tensors share memory"),
    ],
)
def test_wrong_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(6))


def test_neighbours_in_one_memory_share_none() -> None:
    both = torch.ones(6)
    host.copy(both[:3], both[3:]).wait()
    host.accumulate(both[3:], both[:3]).wait()
    assert both.tolist() == [1.0] * 3 + [2.0] * 3


@pytest.mark.parametrize("call", [lambda x: host.accumulate(x, torch.ones(6)), host.sum_of_squares])
def test_fake_tensors_are_refused(call: Any) -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="x is a fake tensor; host kernels take CPU memory"):
        call(torch.ones(6))
