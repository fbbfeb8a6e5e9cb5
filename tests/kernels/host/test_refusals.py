"""What the host's step refuses, gradients that are not finite first of all, and what it does without its C++."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit import host as host_adamw8bit
from leapalign.kernels.adamw8bit.device import expand
from leapalign.kernels.adamw8bit.quantize import BLOCK
from leapalign.kernels.host import native as host
from tests.kernels.host.host_runs import (
    AVERAGES,
    FORMATS,
    HYPER,
    copied,
    differing,
    every_isa,
    needs_native,
    randn,
    run_of,
)

OPTIONS: dict[str, Any] = {"hp": HYPER, "seed": 1, "parameter": 2, "ema_decay": 0.9}
COUNT = 2**16 + 3 * BLOCK + 5  # two ranges of the threads and a short last block


# ---- gradients that are not finite ---------------------------------------------------------------------------------


def spoiled(gradient: Tensor, place: int, value: float) -> Tensor:
    gradient = gradient.clone()
    gradient.view(-1)[place] = value
    return gradient


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2**16 - 1, 2**16, COUNT - 6, COUNT - 1])
def test_a_bad_element_leaves_everything_as_it_was(isa: str, dtype: torch.dtype, value: float, place: int) -> None:
    """At the first and last places of both ranges, in the last whole block and at the end of the short one.

    What was handed over behind it is done all the same.
    """
    run, g = run_of("residual", torch.bfloat16, COUNT, 1), randn(COUNT, seed=2).to(dtype)
    before, later, expected = copied(run), copied(run), copied(run)
    with host.instruction_set(isa):
        bad = host_adamw8bit.update(gradient=spoiled(g, place, value), **run, **OPTIONS, threads=3)
        good = host_adamw8bit.update(gradient=g, **later, **OPTIONS, threads=3)
        good.wait()
        with pytest.raises(FloatingPointError, match="the gradient is not finite"):
            bad.wait()
    assert bad.done() and not differing(run, before)
    adamw8bit.update(gradient=g, **expected, **OPTIONS)
    assert not differing(later, expected)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "change",
    [
        lambda left, right: (spoiled(left, 0, math.inf), right),
        lambda left, right: (left, spoiled(right, -1, math.nan)),
        lambda left, right: (spoiled(left, -1, -math.inf), right * 0),  # inf · 0
        lambda left, right: (spoiled(left, 3, 1e30), spoiled(right, 3, 1e30)),  # a product overflows
        lambda left, right: (left * 0 + 1.5e19, right * 0 + 1.5e19),  # a sum of products does
        lambda left, right: (spoiled(left, -1, 1e30), spoiled(right, -1, -1e30)),  # the very last element
    ],
    ids=["inf", "nan", "inf times 0", "product", "sum", "last"],
)
def test_bad_factors_leave_everything_as_it_was(isa: str, dtype: torch.dtype, change: Any) -> None:
    left, right = change(randn(3, 263, seed=3).to(dtype), randn(3, 255, seed=4).to(dtype))
    run = run_of("master", torch.float32, 263 * 255, 5)
    before = copied(run)
    with host.instruction_set(isa), pytest.raises(FloatingPointError, match="weights and states are as they were"):
        host_adamw8bit.update(gradient=(left, right), **run, **OPTIONS, threads=2).wait()
    assert not differing(run, before)


@every_isa
def test_large_factors_whose_products_are_finite_are_taken(isa: str) -> None:
    """1.96e38 is over half the largest float: the bound does not clear them, the products have to be looked at."""
    left, right = torch.tensor([[1.4e19, 1.0]]), torch.tensor([[1.4e19, 1.0]])
    theirs = run_of("float32", None, 4, 6)
    ours = copied(theirs)
    adamw8bit.update(gradient=expand(left, right).view(-1), **theirs, **OPTIONS)
    with host.instruction_set(isa):
        host_adamw8bit.update(gradient=(left, right), **ours, **OPTIONS).wait()
    assert not differing(ours, theirs)


@needs_native
@pytest.mark.parametrize("guard", [math.nan, math.inf, -math.inf])
def test_a_guard_refuses_without_reading_the_gradient(guard: float) -> None:
    run, g = run_of("bfloat16", None, 300, 7), randn(300, seed=8)
    before = copied(run)
    handle = host_adamw8bit.update(gradient=g, **run, **OPTIONS, guard=guard)
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        handle.wait()
    assert handle.done() and not differing(run, before)


@every_isa
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_with_a_finite_guard_a_bad_element_spoils_its_block_as_in_the_reference(
    isa: str, weights: str, value: float
) -> None:
    """In each place of a vector register, because a maximum of floats may lose a nan; and in a short last block."""
    count = 20 * BLOCK + 9
    theirs, g = run_of(weights, torch.bfloat16, count, 9), randn(count, seed=10)
    g[torch.arange(16) * (BLOCK + 1)] = value
    g[-3] = value
    ours = copied(theirs)
    adamw8bit.update(gradient=g, **theirs, **OPTIONS)
    with host.instruction_set(isa):
        host_adamw8bit.update(gradient=g, **ours, **OPTIONS, guard=1.0).wait()
    assert not differing(ours, theirs)
    assert not theirs["absmax_m"][torch.arange(16)].isfinite().any() and theirs["absmax_m"][17:19].isfinite().all()


# ---- wrong arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(300, dtype=torch.float64)}, "weights is torch.float64"),
        ({"gradient": torch.zeros(299)}, r"gradient is torch.float32 \(299,\)"),
        ({"absmax_m": torch.zeros(1)}, r"absmax_m is torch.float32 \(1,\)"),
        ({"residual": torch.zeros(300, dtype=torch.int8)}, "pass neither"),
        ({"first": 100}, "pass a multiple of 256"),
        ({"gradient": (torch.zeros(2, 3), torch.zeros(2, 99))}, r"rows \* cols"),
        ({"gradient": (torch.zeros(2, 3), torch.zeros(1, 100))}, r"rows \* cols"),
        ({"gradient": (torch.zeros(3), torch.zeros(1, 100))}, "factors are contiguous"),
        ({"gradient": (torch.zeros(2, 3), torch.zeros(100, 2).T)}, "factors are contiguous"),
        ({"gradient": (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 100))}, "left is torch.float64"),
        ({"gradient": (torch.zeros(2, 3), torch.zeros(2, 100, device="meta"))}, "right is .* on meta"),
        ({"seed": -1}, "seed is -1"),
        ({"parameter": 2**32}, "parameter is 4294967296"),
    ],
)
def test_wrong_arguments_are_refused_at_once(change: dict[str, Any], message: str) -> None:
    arguments = {**run_of("float32", None, 300, 11), "gradient": torch.zeros(300), **OPTIONS}
    with pytest.raises(ValueError, match=message):
        host_adamw8bit.update(**{**arguments, **change})


def test_a_gradient_that_shares_memory_with_the_weights_is_refused() -> None:
    run = run_of("float32", None, 300, 11)
    for gradient in (run["weights"], (run["weights"][:3].view(1, 3), torch.zeros(1, 100))):
        with pytest.raises(ValueError, match="update: two of the tensors share memory"):
            host_adamw8bit.update(gradient=gradient, **run, **OPTIONS)


def test_tensors_on_a_device_are_refused() -> None:
    run = {name: tensor.to("meta") for name, tensor in run_of("float32", None, 300, 12).items()}
    with pytest.raises(ValueError, match="weights is on meta"):
        host_adamw8bit.update(gradient=torch.zeros(300, device="meta"), **run, **OPTIONS)


# ---- without the native module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("average", AVERAGES, ids=str)
@pytest.mark.parametrize("factors", [False, True])
def test_the_fallback_gives_the_same_bits(
    weights: str, average: torch.dtype | None, factors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """520 rows: more than are expanded at a time."""
    count, options = 520 * 3, {**OPTIONS, "first": 5 * BLOCK, "scale": 0.3}
    gradient: Any = (randn(2, 520, seed=13), randn(2, 3, seed=14)) if factors else randn(count, seed=13).bfloat16()
    theirs = run_of(weights, average, count, 15)
    ours = copied(theirs)
    monkeypatch.setattr(host, "native", None)
    monkeypatch.setattr(host, "_say_once", lambda: None)
    dense = expand(*gradient).view(-1) if factors else gradient
    adamw8bit.update(gradient=dense, **theirs, **options)
    handle = host_adamw8bit.update(gradient=gradient, **ours, **options, threads=2)
    handle.wait()
    assert handle.done() and not differing(ours, theirs)


@pytest.mark.parametrize("guard", [None, math.inf])
def test_the_fallback_refuses_a_bad_gradient_and_says_once_what_is_missing(
    guard: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host, "native", None)
    host._say_once.cache_clear()
    run, g = run_of("bfloat16", None, 300, 16), randn(300, seed=17)
    before = copied(run)
    bad = g if guard else spoiled(g, 299, math.inf)
    with caplog.at_level(logging.WARNING):
        host_adamw8bit.update(gradient=g, **copied(run), **OPTIONS).wait()
        handle = host_adamw8bit.update(gradient=bad, **run, **OPTIONS, guard=guard)
        with pytest.raises(FloatingPointError, match="the gradient is not finite"):
            handle.wait()
    host._say_once.cache_clear()
    assert not differing(run, before)
    assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()
