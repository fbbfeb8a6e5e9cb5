"""The 8-bit blocks as a contract: the maps, the nearest code against float64, and bitsandbytes' codes."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.kernels.adamw8bit.quantize import (
    BLOCK,
    blocks_of,
    boundaries,
    dequantize,
    quantize,
    signed_map,
    unsigned_map,
)

MAPS = {"signed": signed_map(), "unsigned": unsigned_map()}
either_map = pytest.mark.parametrize("kind", MAPS)


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes: pip install 'leapalign[bnb]'")


def encode(x: Tensor, map: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    codes, absmax = torch.full((x.numel(),), 77, dtype=torch.uint8), torch.full((blocks_of(x.numel()),), 77.0)
    quantize(x, codes, absmax, map=map, **options)
    return codes, absmax


def values(count: int, seed: int, kind: str, spread: float) -> Tensor:
    """(count,) float32, lognormal with this spread; every ninth is zero, every eleventh subnormal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * torch.randn(count, generator=generator).mul(spread).exp()
    x[::9] = 0
    x[::11] = 1e-41
    return x.abs() if kind == "unsigned" else x


def scaled(x: Tensor, absmax: Tensor) -> Tensor:
    """x in units of its block's absmax as the definition rounds it, float32."""
    return x * (1 / absmax).repeat_interleave(BLOCK)[: x.numel()]


# ---- the maps ------------------------------------------------------------------------------------------------------


def test_the_maps_have_the_values_of_the_paper() -> None:
    """The lowest decade and the ends, by hand: midpoints of equal parts of a decade, rounded to float32 some times."""
    near: dict[str, Any] = {"rel": 4 * 2**-24, "abs": 0}
    signed, unsigned = signed_map().tolist(), unsigned_map().tolist()
    assert signed[127] == 0 and signed[255] == 1 and unsigned[0] == 0 and unsigned[255] == 1
    # decades 1e-7 .. 1e-6 in 1 part, 1e-6 .. 1e-5 in 2; 0.1 .. 1 in 64
    assert signed[128:131] == pytest.approx([5.5e-7, 3.25e-6, 7.75e-6], **near)
    assert signed[252:255] == pytest.approx([1 - 2.5 * 0.9 / 64, 1 - 1.5 * 0.9 / 64, 1 - 0.5 * 0.9 / 64], **near)
    assert signed[:127] == [-value for value in signed[254:127:-1]]
    # 2 parts, 4 parts; 128 parts
    assert unsigned[1:5] == pytest.approx([3.25e-7, 7.75e-7, 2.125e-6, 4.375e-6], **near)
    assert unsigned[253:255] == pytest.approx([1 - 1.5 * 0.9 / 128, 1 - 0.5 * 0.9 / 128], **near)


def test_the_maps_bits_are_fixed() -> None:
    """A saved state means the same numbers on every machine."""
    bits = [MAPS[kind].view(torch.int32).long() for kind in ("signed", "unsigned")]
    position = torch.arange(1, 257)
    assert [int((part.abs() * position).sum() % 1_000_003) for part in bits] == [315205, 114989]


@either_map
def test_the_maps_are_those_of_bitsandbytes(kind: str, bitsandbytes: Any) -> None:
    theirs = bitsandbytes.functional.create_dynamic_map(signed=kind == "signed")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # its linspace rounds twice without fused multiply-add
        torch.testing.assert_close(MAPS[kind], theirs, rtol=4 * 2**-24, atol=0)
    else:
        assert torch.equal(MAPS[kind], theirs)


@either_map
def test_each_boundary_is_the_last_float_below_the_midpoint(kind: str) -> None:
    map, edges = MAPS[kind], boundaries(MAPS[kind])
    above = torch.nextafter(edges, torch.tensor(2.0))
    for low, high, edge, after in zip(map[:-1].tolist(), map[1:].tolist(), edges.tolist(), above.tolist(), strict=True):
        assert Fraction(edge) <= (Fraction(low) + Fraction(high)) / 2 < Fraction(after)


# ---- codes ---------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 1100), seed=st.integers(0, 10**6), kind=st.sampled_from(list(MAPS)), spread=st.floats(0, 6))
def test_codes_are_the_nearest(count: int, seed: int, kind: str, spread: float) -> None:
    """By brute force in float64, where all distances of float32 numbers of one binade or so are exact."""
    map, x = MAPS[kind], values(count, seed, kind, spread)
    codes, absmax = encode(x, map)
    for block, peak in zip(x.split(BLOCK), absmax, strict=True):
        assert block.abs().max() == peak
    positive = absmax.clamp(min=2.0**-126)  # a block of one subnormal
    distances = (scaled(x, positive).double()[:, None] - map.double()).abs()
    assert torch.equal(codes.long(), distances.argmin(dim=1))  # the first of equal ones


@either_map
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("count", [BLOCK, 100 * BLOCK, 100 * BLOCK + 1, 99 * BLOCK + 255, 7])
def test_codes_are_those_of_bitsandbytes(kind: str, spread: float, count: int, bitsandbytes: Any) -> None:
    """Its search of the map; F.quantize_blockwise leads float32 to the kernel with a table, see below."""
    x = values(count, 5, kind, spread)
    codes, absmax = encode(x, MAPS[kind])
    theirs, peaks = torch.ops.bitsandbytes.quantize_blockwise(x.double(), MAPS[kind].clone(), BLOCK)
    assert torch.equal(codes, theirs) and torch.equal(absmax, peaks)


@either_map
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_no_element_is_farther_off_than_with_bitsandbytes_fast_path(
    kind: str, spread: float, bitsandbytes: Any
) -> None:
    map, x = MAPS[kind], values(50 * BLOCK + 9, 6, kind, spread)
    codes, absmax = encode(x, map)
    theirs, state = bitsandbytes.functional.quantize_blockwise(x, code=map.clone(), blocksize=BLOCK)
    assert torch.equal(absmax, state.absmax)
    y = scaled(x, absmax).double()
    assert ((map.double()[codes.long()] - y).abs() <= (map.double()[theirs.long()] - y).abs()).all()


@either_map
def test_bitsandbytes_decodes_to_the_same_bits(kind: str, bitsandbytes: Any) -> None:
    map, x = MAPS[kind], values(50 * BLOCK + 9, 7, kind, 3.0)
    codes, absmax = encode(x, map)
    theirs = bitsandbytes.functional.dequantize_blockwise(codes, absmax=absmax, code=map.clone(), blocksize=BLOCK)
    assert torch.equal(dequantize(codes, absmax, map=map), theirs)


@either_map
def test_ties_go_to_the_lower_code(kind: str) -> None:
    """In a map whose values are 256ths, midpoints are floats and their distances to both neighbours equal."""
    map = (torch.arange(256) - 127) / 128 if kind == "signed" else (torch.arange(256) + 1) / 256
    middle = (map[:-1] + map[1:]) / 2
    x = torch.cat([middle, torch.ones(1)]) * 2.0**-20
    codes, _ = encode(x, map)
    assert torch.equal(codes[:-1].long(), torch.arange(255))
    up, _ = encode(torch.cat([torch.nextafter(middle, torch.ones(255)), torch.ones(1)]), map)
    assert torch.equal(up[:-1].long(), torch.arange(1, 256))


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(MAPS)), spread=st.floats(0, 6))
def test_decoding_is_within_half_a_gap(seed: int, kind: str, spread: float) -> None:
    map, x = MAPS[kind], values(3 * BLOCK + 17, seed, kind, spread)
    codes, absmax = encode(x, map)
    gaps = torch.nn.functional.pad(map.diff(), (1, 1)).double()
    if kind == "signed":
        gaps[0] = 2 * (1 + map[0])  # -1 is encoded as -0.993
    half = torch.maximum(gaps[:-1], gaps[1:])[codes.long()] / 2
    peaks = absmax.double().repeat_interleave(BLOCK)[: x.numel()]
    # The reciprocal, the product with it, the boundary and the product that decodes: four roundings of |y| <= 1.
    error = (dequantize(codes, absmax, map=map).double() - x.double()).abs()
    assert (error <= peaks * half + 4 * 2**-24 * x.abs().double() + 2.0**-149).all()


def test_nonzero_never_emits_code_zero() -> None:
    x = values(40 * BLOCK, 8, "unsigned", 5.0)
    x[3 * BLOCK : 4 * BLOCK] = 0
    plain, _ = encode(x, MAPS["unsigned"])
    codes, absmax = encode(x, MAPS["unsigned"], nonzero=True)
    zero = torch.zeros(40, dtype=torch.bool)
    zero[3] = True
    of_zero_block = zero.repeat_interleave(BLOCK)
    assert (plain == 0).sum() > 2 * BLOCK  # something to be avoided, beside the zero block
    assert (codes[~of_zero_block] > 0).all() and (codes[of_zero_block] == 0).all()
    assert torch.equal(codes, torch.where(of_zero_block, 0, plain.clamp(min=1)))
    assert (dequantize(codes, absmax, map=MAPS["unsigned"]).view(-1, BLOCK).amin(1) > 0).tolist() == (~zero).tolist()


# ---- special blocks ------------------------------------------------------------------------------------------------


@either_map
def test_zero_bytes_and_encoded_zeros_are_zero(kind: str) -> None:
    codes, absmax = encode(torch.zeros(BLOCK + 5), MAPS[kind])
    assert absmax.tolist() == [0, 0] and MAPS[kind][codes.long()].eq(0).all()
    assert dequantize(codes, absmax, map=MAPS[kind]).eq(0).all()
    assert dequantize(torch.zeros_like(codes), absmax, map=MAPS[kind]).eq(0).all()


@either_map
@pytest.mark.parametrize("largest", [1e-45, 1e-40, 2.0**-126, 3e-38, 3.4e38])
def test_the_ends_of_float32_are_encoded(kind: str, largest: float) -> None:
    """Below the smallest normal number values lose relative accuracy, but nothing is above its block or non-finite."""
    x = torch.linspace(0 if kind == "unsigned" else -1, 1, BLOCK, dtype=torch.float64).mul(largest).float()
    codes, absmax = encode(x, MAPS[kind])
    assert absmax.item() == x.abs().max().item()
    decoded = dequantize(codes, absmax, map=MAPS[kind]).double()
    assert (decoded.abs() <= absmax.double()).all()
    # half of the widest gap, 0.9 / 64, or half a code beyond -0.993; a reciprocal below 2^-126 has 22 bits or more
    assert ((decoded - x.double()).abs() <= max(0.9 / 128 * largest * (1 + 1e-6), 2.0**-126)).all()


@either_map
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_element_spoils_its_block_and_no_other(kind: str, bad: float) -> None:
    x = values(4 * BLOCK + 30, 9, kind, 2.0)
    good_codes, good_absmax = encode(x, MAPS[kind])
    for position in (BLOCK + 3, 4 * BLOCK + 1):  # in a whole block and in the short one
        broken = x.clone()
        broken[position] = bad
        codes, absmax = encode(broken, MAPS[kind], nonzero=kind == "unsigned")
        decoded = dequantize(codes, absmax, map=MAPS[kind])
        inside = torch.arange(x.numel()) // BLOCK == position // BLOCK
        assert not decoded[inside].isfinite().any()
        expected = good_codes.clamp(min=1) if kind == "unsigned" else good_codes
        assert torch.equal(codes[~inside], expected[~inside])
        others = torch.arange(5) != position // BLOCK
        assert torch.equal(absmax[others], good_absmax[others])


# ---- use -----------------------------------------------------------------------------------------------------------


def test_it_writes_into_views_and_only_there() -> None:
    """States of a parameter are a part of a unit's flat region."""
    assert all(part.shape == (0,) for part in encode(torch.empty(0), MAPS["signed"]))
    codes, absmax = torch.full((4 * BLOCK,), 9, dtype=torch.uint8), torch.full((4,), 9.0)
    x = values(BLOCK + 10, 10, "signed", 1.0)
    quantize(x, codes[BLOCK : 2 * BLOCK + 10], absmax[1:3], map=MAPS["signed"])
    alone, peaks = encode(x, MAPS["signed"])
    assert torch.equal(codes[BLOCK : 2 * BLOCK + 10], alone) and torch.equal(absmax[1:3], peaks)
    assert codes[:BLOCK].eq(9).all() and codes[2 * BLOCK + 10 :].eq(9).all() and absmax[[0, 3]].eq(9).all()


def test_the_maps_are_new_every_time() -> None:
    """bitsandbytes has written into maps it was given; nobody else sees that."""
    signed_map()[0] = -1
    assert signed_map()[0] > -0.994


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_runs_on_fake_tensors(device: str) -> None:
    with FakeTensorMode():
        map = signed_map(device)
        codes, absmax = torch.empty(300, dtype=torch.uint8, device=device), torch.empty(2, device=device)
        quantize(torch.empty(300, device=device), codes, absmax, map=map, nonzero=True)
        assert dequantize(codes, absmax, map=map).shape == (300,)
    assert signed_map()[255] == 1


def test_wrong_tensors_are_refused() -> None:
    map, codes, absmax = MAPS["signed"], torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    with pytest.raises(ValueError, match=r"reads contiguous float32 \(300,\)"):
        quantize(torch.zeros(299), codes, absmax, map=map)
    with pytest.raises(ValueError, match="reads contiguous float32"):
        quantize(torch.zeros(300, dtype=torch.float64), codes, absmax, map=map)
    with pytest.raises(ValueError, match="reads contiguous float32"):
        quantize(torch.zeros(600)[::2], codes, absmax, map=map)
    with pytest.raises(ValueError, match=r"have float32 \(2,\) there"):
        quantize(torch.zeros(300), codes, torch.zeros(1), map=map)
    with pytest.raises(ValueError, match="pass a flat view"):
        dequantize(codes.view(3, 100), absmax, map=map)
    with pytest.raises(ValueError, match=r"index float32 \(256,\) there"):
        dequantize(codes, absmax, map=map.double())
    with pytest.raises(ValueError, match="on meta"):
        dequantize(codes, absmax, map=map.to("meta"))
