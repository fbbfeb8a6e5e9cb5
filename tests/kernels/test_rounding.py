"""The stochastic-rounding cast as a contract: what it does over all 65,536 draws, and which draws belong to what."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapalign.kernels import rounding

ALL_DRAWS = torch.arange(65536, dtype=torch.int32)
BF16_MAX = torch.finfo(torch.bfloat16).max
FP32_MAX = torch.finfo(torch.float32).max


def float_of(bits: int) -> torch.Tensor:
    """The float32 with these bits, as a tensor of one element."""
    return torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """The bits of a float32 or bfloat16 tensor; they tell -0 from 0 and compare nan."""
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


# Known answers of Random123 (kat_vectors): counter, key, words of philox4x32 with 7 and with 10 rounds.
KNOWN = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        7,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        10,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(
    rounds: int, counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in rounding.philox4x32((c0, c1, c2, c3), key, rounds)) == words


@pytest.mark.parametrize("sign", [0, 1 << 31], ids=["positive", "negative"])
@pytest.mark.parametrize("upper", [0x3F80, 0x3F81, 0x0080, 0x007F, 0x0000, 0x4B7F, 0x7F7E], ids=hex)
@pytest.mark.parametrize("lower", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_a_value_rounds_up_in_exactly_its_fraction_of_all_draws(upper: int, lower: int, sign: int) -> None:
    """Ones, a power of two's neighbours, the smallest normal, subnormals, the value below the largest bf16."""
    x = float_of(sign | upper << 16 | lower)
    rounded = bits_of(rounding.round_with_draws(x, ALL_DRAWS)).int() & 0xFFFF
    down, up = sign >> 16 | upper, sign >> 16 | (upper + 1)
    assert int((rounded == up).sum()) == lower
    assert int((rounded == down).sum()) == 65536 - lower


@pytest.mark.parametrize("value", [1.001, 3.14159, 1e-40, 6.5e-5, 2.9e38])
def test_the_mean_over_all_draws_is_the_value(value: float) -> None:
    """The mean of the 65,536 results, summed in double, is off by at most one rounding for each of them."""
    x = torch.tensor([value])
    mean = rounding.round_with_draws(x, ALL_DRAWS).double().mean()
    assert float(mean) == pytest.approx(float(x.double()), rel=65536 * 2**-53)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=64), st.integers(0, 65535))
def test_the_sign_is_kept_and_nothing_else_depends_on_it(magnitudes: list[int], draw: int) -> None:
    positive = torch.tensor(magnitudes, dtype=torch.int32)
    draws = torch.full_like(positive, draw)
    up = bits_of(rounding.round_with_draws(positive.view(torch.float32), draws))
    down = bits_of(rounding.round_with_draws((positive | -(2**31)).view(torch.float32), draws))
    assert torch.equal(up | -(2**15), down)


def test_every_bf16_value_is_a_fixed_point() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.bfloat16)
    number = ~values.isnan()
    for draw in (0, 1, 32768, 65535):
        rounded = rounding.round_with_draws(values.float(), torch.tensor(draw, dtype=torch.int32))
        assert torch.equal(bits_of(rounded)[number], patterns[number])
        assert bool(rounded[~number].isnan().all())


def test_finite_values_saturate_instead_of_becoming_infinite() -> None:
    past = torch.tensor([FP32_MAX, -FP32_MAX])
    for x in past:
        rounded = rounding.round_with_draws(x.expand(65536).contiguous(), ALL_DRAWS)
        assert torch.equal(rounded, torch.full_like(rounded, math.copysign(BF16_MAX, x)))


@pytest.mark.parametrize("bits", [0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], ids=hex)
def test_nan_stays_nan_with_its_sign(bits: int) -> None:
    rounded = rounding.round_with_draws(float_of(bits), ALL_DRAWS)
    assert bool(rounded.isnan().all())
    assert bool((bits_of(rounded) < 0).all()) == bool(bits >> 31)


@given(
    count=st.integers(0, 200),
    offset=st.one_of(st.integers(0, 40), st.integers(2**35 - 20, 2**35 + 20), st.integers(2**61, 2**61 + 9)),
    cut=st.integers(0, 200),
)
def test_the_draws_do_not_depend_on_where_a_range_is_cut(count: int, offset: int, cut: int) -> None:
    cut = min(cut, count)
    whole = rounding.random_draws(11, 3, 5, offset=offset, count=count)
    left = rounding.random_draws(11, 3, 5, offset=offset, count=cut)
    right = rounding.random_draws(11, 3, 5, offset=offset + cut, count=count - cut)
    assert whole.shape == (count,)
    assert torch.equal(whole, torch.cat([left, right]))


def test_a_draw_is_the_documented_half_word() -> None:
    seed, step, parameter, element = 0x0123456789ABCDEF, 77, 5, (1 << 36) + 13
    block = element // 8
    counter = tuple(torch.tensor([word]) for word in (block & 0xFFFFFFFF, block >> 32, parameter, step))
    words = rounding.philox4x32((counter[0], counter[1], counter[2], counter[3]), (0x89ABCDEF, 0x01234567))
    word = int(words[element % 8 // 2])
    expected = word >> 16 if element % 2 else word & 0xFFFF
    assert int(rounding.random_draws(seed, step, parameter, offset=element, count=1)) == expected


def test_every_coordinate_changes_the_draws() -> None:
    """Two unrelated streams agree in 1 of 65,536 draws: 1,024 of them in at most a few."""
    base = rounding.random_draws(1, 2, 3, count=1024)
    for other in (
        rounding.random_draws(2, 2, 3, count=1024),
        rounding.random_draws(1 + (1 << 32), 2, 3, count=1024),
        rounding.random_draws(1, 3, 3, count=1024),
        rounding.random_draws(1, 2, 4, count=1024),
        rounding.random_draws(1, 2, 3, offset=1024, count=1024),
        rounding.random_draws(1, 2, 3, offset=8 << 32, count=1024),
    ):
        assert int((base == other).sum()) <= 4  # Poisson with mean 1/64: more than 4 has probability 1e-11


def test_the_draws_are_uniform() -> None:
    """2^20 draws in 256 bins by the high byte, and by the low: chi-square with 255 degrees of freedom, mean 255."""
    draws = rounding.random_draws(2024, 1, 0, count=1 << 20)
    for byte in (draws >> 8, draws & 0xFF):
        observed = torch.bincount(byte.long(), minlength=256).double()
        expected = draws.numel() / 256
        chi_square = float(((observed - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)  # six standard deviations


def test_a_tensor_is_rounded_element_by_element_with_its_own_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 29, generator=torch.Generator().manual_seed(0))
    draws = rounding.random_draws(9, 8, 7, count=x.numel()).view(x.shape)
    expected = rounding.round_with_draws(x, draws)
    monkeypatch.setattr(rounding, "SLAB", 100)  # neither a divisor of the size nor a multiple of a block
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    assert rounding.round_stochastic(x, 9, 8, 7, out=out) is out
    assert torch.equal(bits_of(out), bits_of(expected))
    tail = rounding.round_stochastic(x[11:], 9, 8, 7, offset=11 * 29)
    assert torch.equal(bits_of(tail), bits_of(expected[11:]))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1, 0, 0, 0), "seed"),
        ((2**64, 0, 0, 0), "seed"),
        ((0, 2**32, 0, 0), "step"),
        ((0, 0, 2**32, 0), "parameter"),
        ((0, 0, 0, 2**62), "offset"),
        ((0, 0, 0, -1), "offset"),
    ],
)
def test_a_coordinate_out_of_range_is_named(arguments: tuple[int, int, int, int], named: str) -> None:
    seed, step, parameter, offset = arguments
    with pytest.raises(ValueError, match=named):
        rounding.round_stochastic(torch.zeros(3), seed, step, parameter, offset=offset)


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous float32"):
        rounding.round_stochastic(torch.zeros(3, dtype=torch.float64), 0, 0, 0)
    with pytest.raises(ValueError, match="contiguous float32"):
        rounding.round_stochastic(torch.zeros(4, 4).t(), 0, 0, 0)
    with pytest.raises(ValueError, match=r"writes contiguous bfloat16 \(3,\)"):
        rounding.round_stochastic(torch.zeros(3), 0, 0, 0, out=torch.zeros(3))
    with pytest.raises(ValueError, match=r"writes contiguous bfloat16 \(3,\)"):
        rounding.round_stochastic(torch.zeros(3), 0, 0, 0, out=torch.zeros(4, dtype=torch.bfloat16))
