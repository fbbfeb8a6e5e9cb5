"""The C++ kernels against their references in torch: bit for bit, whatever the split, the threads and the values."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapalign.kernels import rounding
from leapalign.kernels.host import native as host
from tests.kernels.host.host_runs import needs_native


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback, as where the module could not be built."""
    monkeypatch.setattr(host, "native", None)
    monkeypatch.setattr(host, "_say_once", lambda: None)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def awkward(count: int, seed: int) -> torch.Tensor:
    """(count,) float32 with every kind of bit pattern: any bits at all, with the special values strewn among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan])
    x = bits.view(torch.float32)
    x[::7] = special.repeat(count // 70 + 1)[: x[::7].numel()]
    return x


@needs_native
def test_an_installation_has_the_native_module() -> None:
    assert host.native is not None, f"leapalign is installed without its native module: {host.missing}"


@needs_native
@given(
    count=st.integers(0, 1700), offset=st.integers(0, 2**40), threads=st.integers(1, 3), seed=st.integers(0, 2**64 - 1)
)
def test_rounding_equals_the_reference(count: int, offset: int, threads: int, seed: int) -> None:
    """Draws are made for blocks of 256: whole ones, tails, heads off the grid of 8, and ranges within one block."""
    x = awkward(count, seed % 1000)
    native = host.round_stochastic(x, seed, 5, 6, offset=offset, threads=threads)
    assert same_bits(native, rounding.round_stochastic(x, seed, 5, 6, offset=offset))


@needs_native
def test_rounding_does_not_depend_on_threads_or_splits() -> None:
    """Large enough that three threads do work: ranges are of 2^16 elements."""
    x = awkward(3 * 256 * 512 + 4321, 1)
    whole = host.round_stochastic(x, 42, 2**32 - 1, 2**32 - 1, offset=3, threads=1)
    assert same_bits(whole, host.round_stochastic(x, 42, 2**32 - 1, 2**32 - 1, offset=3, threads=3))
    parts = [
        host.round_stochastic(part, 42, 2**32 - 1, 2**32 - 1, offset=3 + begin)
        for begin, part in zip(range(0, x.numel(), 100_003), x.split(100_003), strict=True)
    ]
    assert same_bits(whole, torch.cat(parts))


@needs_native
def test_rounding_reads_the_extremes_of_the_counter() -> None:
    x = awkward(1000, 2)
    top = 2**62 - 1001
    native = host.round_stochastic(x, 2**64 - 1, 2**32 - 1, 0, offset=top)
    assert same_bits(native, rounding.round_stochastic(x, 2**64 - 1, 2**32 - 1, 0, offset=top))


def test_rounding_writes_where_it_is_told() -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), requires_grad=True)
    out = torch.empty(5, 7, dtype=torch.bfloat16)
    assert host.round_stochastic(x, 1, 2, 3, out=out) is out
    assert same_bits(out, rounding.round_stochastic(x, 1, 2, 3))
    assert host.round_stochastic(torch.empty(0), 1, 2, 3).shape == (0,)


@pytest.mark.usefixtures("in_torch")
def test_the_fallback_rounds_the_same() -> None:
    x = awkward(1000, 4)
    assert same_bits(host.round_stochastic(x, 1, 2, 3, offset=5), rounding.round_stochastic(x, 1, 2, 3, offset=5))


def gradient(count: int, seed: int) -> torch.Tensor:
    """(count,) bfloat16 over many orders of magnitude, as the gradients of a model are."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(count, generator=generator).mul(4).exp()
    return (torch.randn(count, generator=generator) * scale).bfloat16()


SIZES = [0, 1, 15, 16, 17, 4095, 4096, 4097, 3 * 4096, 100_000, 70 * 4096 + 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", SIZES)
def test_sum_of_squares_is_right(count: int, dtype: torch.dtype) -> None:
    x = gradient(count, count).to(dtype)
    x = x * (1 + 2.0**-20) if dtype == torch.float32 else x  # not bfloat16 numbers
    exact = math.fsum(value * value for value in x.double().tolist())  # each square is exact, fsum rounds once
    roundings = 256 + 4 + math.ceil(math.log2(max(count / 4096, 1))) + 1
    assert host.sum_of_squares(x) == pytest.approx(exact, rel=roundings * 2**-53, abs=0)


@needs_native
@pytest.mark.parametrize("count", SIZES)
def test_sum_of_squares_is_the_same_in_torch_and_for_any_threads(count: int, request: pytest.FixtureRequest) -> None:
    x = gradient(count, count + 1)
    native = host.sum_of_squares(x, threads=1)
    assert native == host.sum_of_squares(x, threads=3)
    request.getfixturevalue("in_torch")
    assert native == host.sum_of_squares(x)


@pytest.mark.parametrize("value", [2.0**-133, 2.0**-64, 3.3895313892515355e38])
def test_sum_of_squares_neither_underflows_nor_overflows(value: float) -> None:
    """From the smallest subnormal bf16 to the largest one, whose square float32 cannot hold."""
    x = torch.full((4096,), value, dtype=torch.bfloat16)
    assert host.sum_of_squares(x) == 4096 * value**2


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_sum_of_squares_shows_a_bad_element(bad: float) -> None:
    x = torch.ones(10_000, dtype=torch.bfloat16)
    x[7001] = bad
    assert not math.isfinite(host.sum_of_squares(x))


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="reads contiguous bfloat16"):
        host.sum_of_squares(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="reads contiguous bfloat16"):
        host.sum_of_squares(torch.zeros(8, dtype=torch.bfloat16)[::2])
    with pytest.raises(ValueError, match="on meta"):
        host.sum_of_squares(torch.zeros(3, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(ValueError, match="reads contiguous float32"):
        host.round_stochastic(torch.zeros(3, dtype=torch.float64), 0, 0, 0)
    with pytest.raises(ValueError, match="step is -1"):
        host.round_stochastic(torch.zeros(3), 0, -1, 0)
    with pytest.raises(ValueError, match="writes contiguous bfloat16"):
        host.round_stochastic(torch.zeros(3), 0, 0, 0, out=torch.zeros(2, dtype=torch.bfloat16))


def test_a_missing_module_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(host, "native", None)
    host._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        host.sum_of_squares(torch.ones(3, dtype=torch.bfloat16))
        host.round_stochastic(torch.ones(3), 0, 0, 0)
    host._say_once.cache_clear()
    assert len(caplog.records) == 1
    assert "C++ compiler" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
