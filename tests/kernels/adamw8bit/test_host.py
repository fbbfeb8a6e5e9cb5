"""The C++ step against `adamw8bit.update`, bit for bit: formats, gradients of every kind, sizes, threads, maps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit import host as host_adamw8bit
from leapalign.kernels.adamw8bit.definition import Hyper, square_root
from leapalign.kernels.adamw8bit.device import expand
from leapalign.kernels.adamw8bit.quantize import (
    BLOCK,
    blocks_of,
    boundaries,
    dequantize,
    quantize,
    signed_map,
    unsigned_map,
)
from leapalign.kernels.host import native as host
from tests.kernels.host.host_runs import (
    AVERAGES,
    FORMATS,
    GRADIENTS,
    HYPER,
    copied,
    differing,
    every_isa,
    needs_native,
    randn,
    run_of,
)

OPTIONS: dict[str, Any] = {"seed": 2**64 - 3, "parameter": 4, "ema_decay": 0.9}
ISAS = st.sampled_from(host.instruction_sets() or ["scalar"])


def factors_of(count: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Three terms whose products are a gradient of so many elements: rows of any length, the shortest that divides."""
    rows = next((rows for rows in (7, 5, 3, 2) if count % rows == 0), 1)
    return randn(3, rows, seed=seed).to(dtype), randn(3, count // rows, seed=seed + 1).to(dtype)


def step_both(
    theirs: dict[str, Any], ours: dict[str, Any], gradient: Any, hp: Hyper, threads: int, **more: Any
) -> None:
    """One step of the reference and one of the host's."""
    dense = gradient if isinstance(gradient, Tensor) else expand(*gradient).view(-1)
    adamw8bit.update(gradient=dense, **theirs, hp=hp, **{**OPTIONS, **more})
    host_adamw8bit.update(gradient=gradient, **ours, hp=hp, **{**OPTIONS, **more}, threads=threads).wait()


# ---- formats, kinds of gradients, sizes ----------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("gradient", ["bfloat16", "float32", "factors", "bfloat16 factors"])
@pytest.mark.parametrize("average", AVERAGES, ids=str)
def test_every_format(isa: str, weights: str, gradient: str, average: torch.dtype | None) -> None:
    """Three steps from empty states, with a short last block."""
    count = 3 * BLOCK + 255
    theirs = run_of(weights, average, count, 1)
    ours = copied(theirs)
    with host.instruction_set(isa):
        for step in (1, 2, 3):
            dtype = torch.bfloat16 if "bfloat16" in gradient else torch.float32
            g: Any = GRADIENTS["lognormal"](count, step).to(dtype)
            if "factors" in gradient:
                g = factors_of(count, step, dtype)
            step_both(theirs, ours, g, dataclasses.replace(HYPER, step=step), 2, scale=0.5)
            assert not differing(ours, theirs)


@every_isa
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("weights", FORMATS)
def test_every_kind_of_gradient(isa: str, kind: str, weights: str) -> None:
    """Alone for three steps, then normal ones: large and small states meet other gradients; a short last block."""
    count = 6 * BLOCK + 77
    theirs = run_of(weights, None, count, 2, size=1e-3)
    ours = copied(theirs)
    with host.instruction_set(isa):
        for step in range(1, 7):
            g = GRADIENTS[kind if step < 4 else "normal"](count, step)
            step_both(theirs, ours, g, dataclasses.replace(HYPER, step=step), 1)
            assert not differing(ours, theirs), step


@needs_native
@settings(max_examples=120)
@given(
    isa=ISAS,
    kinds=st.lists(st.sampled_from(list(GRADIENTS)), min_size=1, max_size=4),
    weights=st.sampled_from(FORMATS),
    average=st.sampled_from(AVERAGES),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    blocks=st.integers(0, 4),
    tail=st.sampled_from([0, 1, 2, 15, 16, 17, 100, 254, 255]),
    size=st.sampled_from([0.0, 1e-41, 1e-38, 1e-3, 1.0, 1e30, 3e38]),
    threads=st.integers(1, 7),
    first=st.sampled_from([0, BLOCK, 2**35 - BLOCK, 2**35, 2**60]),
    scale=st.sampled_from([0.0, 1e-30, 0.37, 1.0]),
    unaligned=st.booleans(),
    beta1=st.sampled_from([0.0, 0.9]),
    eps=st.sampled_from([1e-8, 1e-30]),
    lr=st.sampled_from([0.0, 1e-5, 10.0]),
    seed=st.integers(0, 1000),
)
def test_everything_at_once(
    isa: str, kinds: list[str], weights: str, average: torch.dtype | None, dtype: torch.dtype, blocks: int, tail: int,
    size: float, threads: int, first: int, scale: float, unaligned: bool, beta1: float, eps: float, lr: float,
    seed: int,
) -> None:  # fmt: skip
    count = blocks * BLOCK + tail
    theirs = run_of(weights, average, count, seed, size)
    ours = copied(theirs, unaligned=unaligned)
    with host.instruction_set(isa):
        for step, kind in enumerate(kinds, 1):
            hp = Hyper(lr=lr, beta1=beta1, beta2=0.99, eps=eps, weight_decay=0.1, step=step)
            g = GRADIENTS[kind](count, seed + step).to(dtype)
            if unaligned:
                g = torch.cat([g[:1], g])[1:]
            step_both(theirs, ours, g, hp, threads, first=first, scale=scale)
            assert not differing(ours, theirs), step


@every_isa
@pytest.mark.parametrize("weights", FORMATS)
def test_the_bits_do_not_depend_on_the_threads(isa: str, weights: str) -> None:
    """Six ranges of 2^16 elements, which is what a thread takes at a time, and a short one."""
    count = 6 * 2**16 + 3 * BLOCK + 1
    start, g = run_of(weights, torch.bfloat16, count, 3), GRADIENTS["lognormal"](count, 4).bfloat16()
    theirs = copied(start)
    adamw8bit.update(gradient=g, **theirs, hp=HYPER, **OPTIONS)
    with host.instruction_set(isa):
        for threads in range(1, 8):
            ours = copied(start)
            host_adamw8bit.update(gradient=g, **ours, hp=HYPER, **OPTIONS, threads=threads).wait()
            assert not differing(ours, theirs), threads


@needs_native
@settings(max_examples=40)
@given(cuts=st.sets(st.integers(1, 9)), isa=ISAS, threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_bits_do_not_depend_on_how_a_parameter_is_cut(cuts: set[int], isa: str, threads: int, seed: int) -> None:
    """Runs that are handed over one after the other, and waited for at the end."""
    count = 9 * BLOCK + 31
    whole, g = run_of("bfloat16", torch.bfloat16, count, seed), randn(count, seed=seed + 2)
    pieces, handles = copied(whole), []
    adamw8bit.update(gradient=g, **whole, hp=HYPER, **OPTIONS)
    with host.instruction_set(isa):
        for begin, end in itertools.pairwise([0, *(BLOCK * cut for cut in sorted(cuts)), count]):
            part, blocks = slice(begin, end), slice(begin // BLOCK, blocks_of(end))
            views = {name: tensor[blocks if name.startswith("absmax") else part] for name, tensor in pieces.items()}
            handles.append(
                host_adamw8bit.update(gradient=g[part], **views, hp=HYPER, **OPTIONS, first=begin, threads=threads)
            )
        for handle in handles:
            handle.wait()
    assert not differing(pieces, whole)


@every_isa
@pytest.mark.parametrize(("rows", "cols"), [(600, 7), (1, 1), (1, 1000), (3, BLOCK), (520, 333), (1000, 1)])
@pytest.mark.parametrize("terms", [0, 1, 8])
def test_factors(isa: str, rows: int, cols: int, terms: int) -> None:
    """Rows within a block, blocks within a row, and more than a thread takes at a time."""
    left, right = randn(terms, rows, seed=5), randn(terms, cols, seed=6).bfloat16()
    theirs = run_of("master", torch.float32, rows * cols, 7)
    ours = copied(theirs)
    with host.instruction_set(isa):
        step_both(theirs, ours, (left, right), HYPER, 3, scale=0.25)
    assert not differing(ours, theirs)


# ---- the maps ------------------------------------------------------------------------------------------------------

# With these m = g and √v = |g|, without rounding: what is encoded is the gradient.
PASS_ON = Hyper(lr=1e-3, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0, step=1)


def encoded_by(isa: str, g: Tensor) -> dict[str, Tensor]:
    run = run_of("float32", None, g.numel(), 8)
    with host.instruction_set(isa):
        host_adamw8bit.update(gradient=g, **run, hp=PASS_ON, seed=1, parameter=2).wait()
    return {name: tensor for name, tensor in run.items() if name != "weights"}


def expected_codes(g: Tensor) -> dict[str, Tensor]:
    names = ("codes_m", "absmax_m", "codes_v", "absmax_v")
    run = run_of("float32", None, g.numel(), 8)
    codes_m, absmax_m, codes_v, absmax_v = (run[name] for name in names)
    quantize(g, codes_m, absmax_m, map=signed_map())
    quantize(g.abs(), codes_v, absmax_v, map=unsigned_map(), nonzero=True)
    return dict(zip(names, (codes_m, absmax_m, codes_v, absmax_v), strict=True))


def with_one_in_each_block(values: Tensor, one: float) -> Tensor:
    """Blocks of 255 of the values, and a `one`, the largest, at a place of its own: absmax is 1 and y the value."""
    values = torch.nn.functional.pad(values, (0, -values.numel() % (BLOCK - 1))).view(-1, BLOCK - 1)
    rows = torch.arange(len(values))[:, None]
    columns = torch.arange(BLOCK - 1).expand_as(values)
    blocks = torch.full((len(values), BLOCK), one)
    blocks[rows, columns + (columns >= rows % BLOCK)] = values
    return blocks.view(-1)


@pytest.fixture(scope="module")
def near_boundaries() -> tuple[Tensor, dict[str, Tensor]]:
    """Every float within 64 of a boundary of either map, with both signs, and its codes by the definition."""
    edges = torch.cat([boundaries(signed_map()).abs(), boundaries(unsigned_map())])
    bits = (edges.view(torch.int32)[:, None] + torch.arange(-64, 65, dtype=torch.int32)).flatten()
    values = bits.view(torch.float32)
    g = with_one_in_each_block(torch.cat([values, -values]).clamp(-1, 1), -1.0)
    return g, expected_codes(g)


@pytest.fixture(scope="module")
def anywhere() -> tuple[Tensor, dict[str, Tensor]]:
    """2^22 floats up to 1 of any bits, three quarters of them over 2^-32, and their codes by the definition."""
    generator = torch.Generator().manual_seed(9)
    low = torch.where(torch.arange(2**22) % 4 == 0, 0, 95 << 23)
    spread = torch.rand(2**22, generator=generator, dtype=torch.float64) * ((127 << 23) - low)
    values = (low + spread.long()).to(torch.int32).view(torch.float32)
    g = with_one_in_each_block(torch.where(torch.arange(2**22) % 8 < 4, values, -values), 1.0)
    return g, expected_codes(g)


@every_isa
@pytest.mark.parametrize("values", ["near_boundaries", "anywhere"])
def test_codes_are_the_nearest(isa: str, values: str, request: pytest.FixtureRequest) -> None:
    g, expected = request.getfixturevalue(values)
    found = encoded_by(isa, g)
    assert not differing(found, expected)
    assert expected["codes_m"].unique().numel() == 256 and expected["codes_v"].unique().numel() == 255  # never 0


@every_isa
def test_every_code_is_decoded_exactly(isa: str) -> None:
    """Each code alone in a block, among values of 0, at every place once: the new absmax is |value| · old absmax.

    √(1 - β2) and 1 - β1 are 2^-26, so that the factors on the largest are 1 in float32, and g = 0.
    """
    keep = Hyper(lr=2.0**-53, beta1=1 - 2.0**-26, beta2=1 - 2.0**-52, eps=1.0, weight_decay=0.0, step=1)
    sizes = torch.tensor([1.0, 0.1, torch.pi, 1.9999999, 1e-15, 1e15, 1e-20, 3e38, 1.2e-38, 1e-41, 1e-45])
    code = torch.arange(256).repeat(len(sizes))
    place = (code * 37 + torch.arange(len(code)) // 256) % BLOCK
    run = run_of("float32", None, len(code) * BLOCK, 10, size=0.0)
    run["codes_m"].fill_(127)[torch.arange(len(code)) * BLOCK + place] = code.to(torch.uint8)
    run["codes_v"][torch.arange(len(code)) * BLOCK + place] = code.to(torch.uint8)
    for name in ("absmax_m", "absmax_v"):
        run[name].copy_(sizes.repeat_interleave(256))
    m = dequantize(run["codes_m"], run["absmax_m"], map=signed_map()).view(-1, BLOCK)
    squares = dequantize(run["codes_v"], run["absmax_v"].square(), map=unsigned_map().square())
    root = square_root(squares).view(-1, BLOCK)  # 0, or inf and then nan for code 0, where the largest's square is
    theirs = copied(run)
    g = torch.zeros(len(code) * BLOCK)
    with host.instruction_set(isa):
        step_both(theirs, run, g, keep, 1)
    assert not differing(run, theirs)
    assert torch.equal(run["absmax_m"], m.abs().amax(1))
    torch.testing.assert_close(run["absmax_v"], root.amax(1), rtol=0, atol=0, equal_nan=True)


# ---- stochastic rounding -------------------------------------------------------------------------------------------


@every_isa
def test_weights_and_averages_are_rounded_up_as_often_as_they_should_be(isa: str) -> None:
    """Every number from 1 to 1 + 2^-7, the next bfloat16, 2^-23 apart, eight times: 65,536 fractions f of a place.

    Roots vanish against an eps as large as lr: w becomes -g exactly, and is then rounded to bfloat16. In each of 64
    ranges of fractions the 8,192 draws round up Σ f times, with variance Σ f (1 - f). The sum of squares, in units of
    that, is nearly chi-square with 64 degrees of freedom: over 64 + 6 √128 by chance once in a million.
    """
    fraction = torch.arange(2**16).repeat_interleave(8) / 2**16
    x = 1 + fraction * 2**-7
    hp = Hyper(lr=2.0**100, beta1=0.0, beta2=0.0, eps=2.0**100, weight_decay=0.0, step=1)
    run = run_of("bfloat16", torch.bfloat16, x.numel(), 18, size=0.0)
    with host.instruction_set(isa):
        host_adamw8bit.update(gradient=-x, **run, hp=hp, seed=19, parameter=20).wait()
        # Half the way from 0 to 2 x, also without rounding.
        average = torch.zeros(x.numel(), dtype=torch.bfloat16)
        host.ema(average, 2 * x, 0.5, seed=19, step=1, parameter=20).wait()
    variance = (fraction * (1 - fraction)).view(64, -1).double().sum(1)
    for rounded in (run["weights"], average):
        up = (rounded.double() - 1) * 2**7
        assert set(up.unique().tolist()) == {0.0, 1.0}
        beyond = (up - fraction).view(64, -1).sum(1)
        assert (beyond.square() / variance).sum() < 64 + 6 * math.sqrt(128)
    assert not torch.equal(run["weights"], average)  # other draws
