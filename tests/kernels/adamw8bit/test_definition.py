"""8-bit AdamW as a contract: torch's AdamW, float64, the bits of every weight format, and why √v."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit.definition import (
    AVERAGE_STREAM,
    Hyper,
    adamw,
    join_residual,
    scalars,
    split_residual,
    square_root,
    to_bitsandbytes,
    update,
)
from leapalign.kernels.adamw8bit.quantize import BLOCK, blocks_of, quantize, signed_map, unsigned_map
from leapalign.kernels.rounding import round_stochastic
from tests.kernels.adamw8bit.states import HYPER, Moments, moments_of, randn, state, used_state

EPS = 2.0**-24  # half a unit in the last place of float32, relative
FORMATS = ["float32", "bfloat16", "residual", "master"]
BF16_MAX = torch.finfo(torch.bfloat16).max


def run_of(weights: str, average: torch.dtype | None, count: int, seed: int) -> dict[str, Any]:
    """Every tensor that `update` takes for a run of this format, by the name of its argument, with values."""
    tensors: dict[str, Any] = dict(
        zip(("codes_m", "absmax_m", "codes_v", "absmax_v"), used_state(count, seed), strict=True)
    )
    w = randn(count, seed + 50)
    tensors["weights"] = w.clone() if weights == "float32" else w.bfloat16()
    if weights == "residual":
        tensors["residual"] = torch.empty(count, dtype=torch.int8)
        split_residual(w, tensors["weights"], tensors["residual"])
    if weights == "master":
        tensors["master"] = w
    if average is not None:
        tensors["ema"] = randn(count, seed + 51).to(average)
    return tensors


def moments_in(tensors: dict[str, Tensor]) -> Moments:
    return tensors["codes_m"], tensors["absmax_m"], tensors["codes_v"], tensors["absmax_v"]


def copied(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


# ---- the arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torch_adamw(dtype: torch.dtype) -> None:
    """Over 30 steps. The order of operations is torch's, up to the places where it may contract to one rounding."""
    unit, steps, hp = torch.finfo(dtype).eps / 2, 30, HYPER
    parameter = torch.nn.Parameter(randn(1000, 1).to(dtype))
    optimizer = torch.optim.AdamW(
        [parameter], lr=hp.lr, betas=(hp.beta1, hp.beta2), eps=hp.eps, weight_decay=hp.weight_decay, foreach=False
    )
    w, m, v = parameter.detach().clone(), torch.zeros(1000, dtype=dtype), torch.zeros(1000, dtype=dtype)
    for step in range(1, steps + 1):
        g = (randn(1000, step + 1) * randn(1000, 0).exp()).to(dtype)
        parameter.grad = g.clone()
        optimizer.step()
        w, m, v = adamw(w, g, m, v, dataclasses.replace(hp, step=step))
        theirs = optimizer.state[parameter]
        # Per step: three roundings in m, of numbers up to |g| + |m|; four in v >= 0, each relative to its value. The
        # scalars (1 - β ...) are the same floats. In w: two of |w|; ten of an update below 4 lr; what v brings along;
        # what m brings along, whose bound is 60 units of √v / √(1 - β2).
        largest = torch.maximum(theirs["exp_avg_sq"].sqrt() * (1 - hp.beta2) ** -0.5, g.abs())
        assert ((m - theirs["exp_avg"]).abs() <= 2 * 3 * 10 * unit * 2 * largest).all()  # 10: the sum of 0.9^k
        assert ((v - theirs["exp_avg_sq"]).abs() <= 2 * 4 * step * unit * v).all()
        of_m = 60 * ((1 - hp.beta2**step) / (1 - hp.beta2)) ** 0.5
        moved = hp.lr * (4 * (10 + 4 * step) + of_m) * unit
        assert ((w - parameter).abs() <= step * (2 * 2 * unit * (w.abs() + 8 * hp.lr) + moved)).all()


def test_the_first_step_is_lr_towards_minus_the_sign() -> None:
    """Bias correction makes m = g and v = g² at step 1: the equation by hand."""
    g = torch.tensor([3.0, -0.5, 1e-3, 0.0], dtype=torch.float64)
    w = torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=torch.float64)
    new, m, v = adamw(w, g, torch.zeros_like(w), torch.zeros_like(w), HYPER)
    expected = w * (1 - 1e-3 * 0.01) - 1e-3 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(new, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(m, 0.1 * g, rtol=1e-14, atol=0)
    torch.testing.assert_close(v, 0.001 * g * g, rtol=1e-13, atol=0)


@given(
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.99999),
    lr=st.floats(1e-8, 1),
    decay=st.floats(0, 1),
    step=st.integers(1, 10**6),
    scale=st.floats(1e-3, 1),
)
def test_folding_the_scalars_changes_nothing(
    beta1: float, beta2: float, lr: float, decay: float, step: int, scale: float
) -> None:
    """In float64: `step` on decayed moments is `adamw`.

    A bias correction 1 - β^t has 2^-53 / (1 - β^t) of rounding, at most 2^-53 / 1e-5 here; the others are some 2^-53.
    """
    hp = Hyper(lr=lr, beta1=beta1, beta2=beta2, eps=1e-8, weight_decay=decay, step=step)
    by, w, g, m = scalars(hp, scale), *(randn(64, seed).double() for seed in range(3))
    root = randn(64, 3).double().abs() + 0.1
    expected, expected_m, expected_v = adamw(w, g * scale, m, root.square(), hp)
    found, found_m, found_root = adamw8bit.step(w, g, m * by.decay_m, (root * by.decay_root).square(), by)
    torch.testing.assert_close(found_m, expected_m, rtol=0, atol=16 * 2**-53 * float((m.abs() + g.abs()).max()))
    torch.testing.assert_close(found_root * by.unit, expected_v.sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found - w * by.decay_w, expected - w * by.decay_w, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("lr", [0.0, 1e-45, 1e-320])
def test_a_rate_of_next_to_nothing_moves_nothing(lr: float) -> None:
    """Its reciprocal would be infinite, and nan times the roots of 0."""
    w, g, moments = randn(BLOCK, 13), randn(BLOCK, 14), state(BLOCK)
    g[::2] = 0
    update(w, g, *moments, dataclasses.replace(HYPER, lr=lr, eps=0.0), seed=1, parameter=2)
    assert torch.equal(w, randn(BLOCK, 13))
    assert (moments_of(moments)[0][1::2] != 0).all()


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_adamw_on_the_decoded_moments(gradient_dtype: torch.dtype) -> None:
    """In float64, from the states to the weights; the new states are those of the fp32 moments."""
    count, hp, scale = 5 * BLOCK + 77, dataclasses.replace(HYPER, step=4), 0.37
    moments, w = used_state(count, 3), randn(count, 4)
    g = randn(count, 5).mul(0.1).to(gradient_dtype)
    m, root = (moment.double() for moment in moments_of(moments))
    expected, m, v = adamw(w.double(), g.double() * scale, m, root.square(), hp)
    before = w.clone()
    update(w, g, *moments, hp, seed=1, parameter=2, scale=scale)
    # Thirteen roundings of an update that the moments bound by ten: four of each term of m; eight of each of u, which
    # are four of its root; the root's, two of its factor's, the sum's, ε's, the quotient's. Two of the weight.
    moved = (expected - before.double()).abs()
    assert ((w.double() - expected).abs() <= 14 * EPS * (moved + hp.lr * 10) + 3 * EPS * before.abs()).all()
    new_m, new_root = moments_of(moments)
    for new, exact in ((new_m, m), (new_root, v.sqrt())):
        peak = torch.nn.functional.pad(exact.abs(), (0, -count % BLOCK)).view(-1, BLOCK).amax(1)
        peak = peak.repeat_interleave(BLOCK)[:count]
        # half of the widest gap of the maps, 0.9 / 64, and -1 that is stored as -0.993
        assert ((new.double() - exact).abs() <= peak * (0.9 / 128 + 16 * EPS)).all()


def test_scale_is_applied_to_the_gradient() -> None:
    count, g = 300, randn(300, 6)
    clipped, plain = run_of("bfloat16", None, count, 7), run_of("bfloat16", None, count, 7)
    update(gradient=g, **clipped, hp=HYPER, seed=1, parameter=2, scale=0.25)
    update(gradient=g * 0.25, **plain, hp=HYPER, seed=1, parameter=2)  # exact, as the factor that it is folded into
    assert same_bits(clipped, plain)


@pytest.mark.parametrize("lowest", [0x3F800000, 0x00000000, 0x00800000, 0x7F000000])
def test_roots_are_rounded_to_nearest(lowest: int) -> None:
    """2^20 numbers from 1, 0, the smallest normal one, 2^127 on: x lies between the squares of the midpoints around √x.

    A midpoint has 25 bits, so that its square is exact in double.
    """
    steps = torch.randint(
        2**24 if lowest == 0x3F800000 else 2**23, (2**20,), generator=torch.Generator().manual_seed(30)
    )
    x = (steps.int() + lowest).view(torch.float32)
    root = square_root(x)
    below, above = (torch.nextafter(root, torch.full_like(root, end)).double() for end in (-math.inf, math.inf))
    low, high = (root.double() + below) / 2, (root.double() + above) / 2
    assert (low.clamp(min=0).square() <= x.double()).all() and (x.double() <= high.square()).all()
    assert torch.equal(square_root(x.double()), x.double().sqrt())


# ---- the weights' formats ------------------------------------------------------------------------------------------


def fp32_result(tensors: dict[str, Tensor], w: Tensor, g: Tensor, hp: Hyper) -> Tensor:
    m, root = moments_of(moments_in(tensors))
    return adamw(w, g, m, root.square(), hp)[0]


def test_bfloat16_weights_are_rounded_with_the_draws_of_their_elements() -> None:
    count, g, hp = 2 * BLOCK + 9, randn(2 * BLOCK + 9, 8), dataclasses.replace(HYPER, step=9)
    tensors = run_of("bfloat16", None, count, 9)
    exact = fp32_result(tensors, tensors["weights"].float(), g, hp)
    update(gradient=g, **tensors, hp=hp, seed=5, parameter=6, first=7 * BLOCK)
    assert torch.equal(tensors["weights"], round_stochastic(exact, 5, 9, 6, offset=7 * BLOCK))


def test_a_master_holds_the_float32_weights() -> None:
    count, g = 2 * BLOCK + 9, randn(2 * BLOCK + 9, 10)
    tensors, plain = run_of("master", torch.float32, count, 11), run_of("float32", torch.float32, count, 11)
    tensors["weights"].fill_(math.nan)  # not read
    update(gradient=g, **tensors, hp=HYPER, seed=1, parameter=2, ema_decay=0.9)
    update(gradient=g, **plain, hp=HYPER, seed=1, parameter=2, ema_decay=0.9)
    assert torch.equal(tensors["master"], plain["weights"])
    assert torch.equal(tensors["weights"], plain["weights"].bfloat16())
    assert torch.equal(tensors["ema"], plain["ema"])


def test_a_residual_holds_24_bits() -> None:
    count, g = 2 * BLOCK + 9, randn(2 * BLOCK + 9, 12)
    tensors = run_of("residual", None, count, 13)
    exact = fp32_result(tensors, join_residual(tensors["weights"], tensors["residual"]), g, HYPER)
    update(gradient=g, **tensors, hp=HYPER, seed=1, parameter=2)
    stored = join_residual(tensors["weights"], tensors["residual"])
    assert ((stored - exact).abs() <= 2.0**-16 * exact.abs()).all()
    assert not torch.equal(stored, tensors["weights"].float())


def joined(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(24-bit numbers in float32, their bfloat16 part, their residual) of x."""
    weights, residual = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape, dtype=torch.int8)
    split_residual(x, weights, residual)
    return join_residual(weights, residual), weights, residual


def test_every_24_bit_number_is_kept_and_its_first_part_is_the_nearest_bfloat16() -> None:
    """All 2^24 bit patterns but non-finite ones and the 128 at each end that round to an infinite bfloat16."""
    patterns = torch.arange(2**23, dtype=torch.int32)
    for sign in (0, 1):
        x = (patterns << 8 | -(2**31) * sign).view(torch.float32)
        x = x[x.abs() < BF16_MAX * (1 + 2.0**-9)]
        back, weights, residual = joined(x)
        assert torch.equal(back.view(torch.int32), x.view(torch.int32))
        nearest, tie = x.bfloat16(), residual == -128
        assert torch.equal(weights[~tie].view(torch.int16), nearest[~tie].view(torch.int16))
        assert (weights[tie].float() - x[tie]).abs().equal((nearest[tie].float() - x[tie]).abs())


@given(bits=st.lists(st.integers(0, 0x7F7F7F7F), min_size=1, max_size=50), negative=st.booleans())
def test_24_bits_are_rounded_to_nearest_even(bits: list[int], negative: bool) -> None:
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    expected = torch.tensor([round(pattern / 256) << 8 for pattern in bits], dtype=torch.int32)  # Python's, to even
    back, _, _ = joined(-x if negative else x)
    assert torch.equal(back.abs().view(torch.int32), expected)
    assert torch.equal(back.signbit(), torch.full_like(back, negative, dtype=torch.bool))


def test_special_values_have_24_bits() -> None:
    big = torch.finfo(torch.float32).max
    back, weights, residual = joined(torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, big, -big]))
    assert back[:4].tolist() == [0, 0, math.inf, -math.inf] and back[4].isnan()
    assert back[:2].signbit().tolist() == [False, True]
    assert residual[:5].eq(0).all()
    assert weights[5:].tolist() == [BF16_MAX, -BF16_MAX] and (back[5] > BF16_MAX) and (back[5] == -back[6])
    alone = randn(500, 14).bfloat16()
    assert torch.equal(join_residual(alone, torch.zeros(500, dtype=torch.int8)), alone.float())


@pytest.mark.parametrize("weights", FORMATS)
def test_the_average_follows_the_stored_weights(weights: str) -> None:
    count, g = BLOCK + 5, randn(BLOCK + 5, 15)
    tensors = run_of(weights, torch.float32, count, 16)
    old = tensors["ema"].double()
    update(gradient=g, **tensors, hp=HYPER, seed=1, parameter=2, ema_decay=0.9)
    stored = tensors["weights"].double()
    if weights == "residual":
        stored = join_residual(tensors["weights"], tensors["residual"]).double()
    if weights == "master":
        stored = tensors["master"].double()
    expected = old + (1 - 0.9) * (stored - old)
    assert ((tensors["ema"].double() - expected).abs() <= 4 * EPS * (old.abs() + stored.abs())).all()


def test_a_bfloat16_average_has_draws_of_its_own() -> None:
    count, g = 2 * BLOCK, randn(2 * BLOCK, 17)
    tensors = run_of("bfloat16", torch.bfloat16, count, 18)
    old = tensors["ema"].float()
    update(gradient=g, **tensors, hp=HYPER, seed=1, parameter=2, first=BLOCK, ema_decay=0.9)
    exact = old + (tensors["weights"].float() - old) * (1 - 0.9)
    assert torch.equal(tensors["ema"], round_stochastic(exact, 1, 1, 2, offset=AVERAGE_STREAM + BLOCK))
    assert not torch.equal(tensors["ema"], round_stochastic(exact, 1, 1, 2, offset=BLOCK))


# ---- in pieces -----------------------------------------------------------------------------------------------------

TOTAL = 9 * BLOCK + 31


@given(
    cuts=st.sets(st.integers(1, TOTAL // BLOCK)),
    weights=st.sampled_from(FORMATS),
    average=st.sampled_from([None, torch.float32, torch.bfloat16]),
)
def test_the_bits_do_not_depend_on_how_a_parameter_is_cut(
    cuts: set[int], weights: str, average: torch.dtype | None
) -> None:
    whole, g = run_of(weights, average, TOTAL, 19), randn(TOTAL, 20)
    pieces = copied(whole)
    options: dict[str, Any] = {"hp": HYPER, "seed": 3, "parameter": 4, "ema_decay": 0.99, "scale": 0.7}
    update(gradient=g, **whole, **options)
    edges = [0, *(BLOCK * cut for cut in sorted(cuts)), TOTAL]
    for first, end in itertools.pairwise(edges):
        part, blocks = slice(first, end), slice(first // BLOCK, blocks_of(end))
        views = {name: tensor[blocks if name.startswith("absmax") else part] for name, tensor in pieces.items()}
        update(gradient=g[part], **views, **options, first=first)
    assert same_bits(whole, pieces)


def test_the_bits_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, g = run_of("bfloat16", torch.bfloat16, TOTAL, 21), randn(TOTAL, 22)
    chunked = copied(whole)
    update(gradient=g, **whole, hp=HYPER, seed=3, parameter=4)
    exported = to_bitsandbytes(*moments_in(whole))
    monkeypatch.setattr(adamw8bit, "CHUNK", 2 * BLOCK)
    update(gradient=g, **chunked, hp=HYPER, seed=3, parameter=4)
    assert same_bits(whole, chunked)
    again = to_bitsandbytes(*moments_in(whole))
    assert same_bits(exported, again)


def test_a_bad_gradient_spoils_its_block_and_no_other() -> None:
    broken, g = run_of("float32", None, TOTAL, 23), randn(TOTAL, 24)
    good = copied(broken)
    update(gradient=g, **good, hp=HYPER, seed=3, parameter=4)
    g[2 * BLOCK + 7] = math.nan
    update(gradient=g, **broken, hp=HYPER, seed=3, parameter=4)
    outside = torch.arange(TOTAL) // BLOCK != 2
    assert broken["weights"].isnan().sum() == 1
    for name in ("weights", "codes_m", "codes_v"):
        assert torch.equal(broken[name][outside], good[name][outside])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_runs_on_fake_tensors(device: str) -> None:
    with FakeTensorMode():
        w, low = (torch.empty(300, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.int8))
        codes, absmax = torch.empty(300, dtype=torch.uint8, device=device), torch.empty(2, device=device)
        moments = (codes, absmax, codes.clone(), absmax.clone())
        g = torch.empty(300, device=device)
        update(w, g, *moments, HYPER, seed=1, parameter=2, ema=w.clone())
        update(w, g, *moments, HYPER, seed=1, parameter=2, residual=low)
        assert to_bitsandbytes(*moments)["absmax2"].shape == (2,)


# ---- why -----------------------------------------------------------------------------------------------------------


def largest_updates(spread: float, *, root: bool) -> Tensor:
    """(steps, n) |update| / lr over 60 steps of gradients whose sizes in a block are lognormal with this spread.

    The second moment is kept as √v without code 0, or as v itself in the same map, as bitsandbytes keeps it.
    """
    count = 32 * BLOCK
    codes_m, absmax_m, codes_v, absmax_v = state(count)
    sizes, updates = randn(count, 25).mul(spread).exp(), []
    for step in range(1, 61):
        hp = Hyper(lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=step)
        w, g = torch.zeros(count), randn(count, 100 + step) * sizes
        if root:
            update(w, g, codes_m, absmax_m, codes_v, absmax_v, hp, seed=0, parameter=0)
        else:
            m, v = moments_of((codes_m, absmax_m, codes_v, absmax_v))
            w, m, v = adamw(w, g, m, v, hp)
            quantize(m, codes_m, absmax_m, map=signed_map())
            quantize(v, codes_v, absmax_v, map=unsigned_map())
        updates.append(w.abs())
    return torch.stack(updates)


@pytest.mark.parametrize(("spread", "share"), [(2.0, 0.01), (3.0, 0.05)])
def test_the_root_of_v_keeps_updates_bounded_where_v_does_not(spread: float, share: float) -> None:
    """The reason for √v, as it was measured: in fp32 no update exceeds 1.1 here.

    Derived: v below 1.6e-7 of the largest is stored as 0, which is |g| below 4e-4 of the largest; m, whose map reaches
    2.75e-7, is not. With lognormal sizes of spread s the largest of 256 is about exp(2.8 s) and the share of elements
    with log size < 2.8 s + log(4e-4) is Φ(2.8 - 7.8 / s): 13% at s = 2, more at 3, less the gradients drawn larger.
    """
    plain, root = largest_updates(spread, root=False), largest_updates(spread, root=True)
    assert (plain > 5).float().mean() > share
    assert plain.max() > 1000
    assert not (root > 5).any()


def test_stochastic_rounding_moves_the_mean_and_rounding_to_nearest_does_not() -> None:
    """1,000 updates of 1e-5 from w = 1: bfloat16's next number below is 2^-8 away, 390 updates.

    A step moves an element by 2^-8 with probability p = 1e-5 · 2^8, so the sum has variance 1000 p (1 - p) 2^-16 at
    most and the mean of n elements that over n. A constant gradient keeps m = √v in code 255: the update is lr, but
    for roundings of the weight to float32, of at most 2^-25 each.
    """
    count, steps, lr = 4096, 1000, 1e-5
    w, exact, nearest = torch.ones(count, dtype=torch.bfloat16), torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    g, moments, alone = torch.ones(count), state(count), state(1)
    for step in range(1, steps + 1):
        hp = Hyper(lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=step)
        update(w, g, *moments, hp, seed=7, parameter=0)
        update(exact, torch.ones(1), *alone, hp, seed=7, parameter=0)
        nearest = (nearest.float() - lr).bfloat16()
    rounding = steps * 2.0**-25
    assert abs(exact.item() - (1 - steps * lr)) <= 2 * rounding
    p = lr * 2**8
    error = math.sqrt(steps * p * (1 - p) * 2.0**-16 / count)
    assert abs(w.double().mean().item() - exact.item()) <= 5 * error + 2 * rounding
    assert 5 * error + 2 * rounding < 0.1 * steps * lr  # the tolerance tells moving from standing still
    assert nearest.item() == 1


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(300, dtype=torch.float64)}, "weights is torch.float64"),
        ({"gradient": torch.zeros(299)}, r"gradient is torch.float32 \(299,\)"),
        ({"gradient": torch.zeros(300, device="meta")}, "gradient is .* on meta"),
        ({"codes_v": torch.zeros(300)}, "codes_v is torch.float32"),
        ({"absmax_v": torch.zeros(3)}, r"absmax_v is torch.float32 \(3,\)"),
        ({"ema": torch.zeros(600)[::2]}, "ema is"),
        ({"residual": torch.zeros(300, dtype=torch.uint8)}, "residual is torch.uint8"),
        ({"master": torch.zeros(300)}, "pass neither"),
        ({"residual": torch.zeros(300, dtype=torch.int8), "master": torch.zeros(300)}, "pass one"),
        ({"first": 100}, "pass a multiple of 256"),
        ({"first": -256}, "pass a multiple of 256"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {**run_of("float32", None, 300, 29), "gradient": torch.zeros(300)}
    with pytest.raises(ValueError, match=message):
        update(**{**arguments, **change}, hp=HYPER, seed=1, parameter=2)
