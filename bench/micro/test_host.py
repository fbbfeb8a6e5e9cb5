"""Kernels of the host (kernels/host/native.py, kernels/adamw8bit/host.py) on each instruction set, beside torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.micro.conftest import Measure
from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit import host as host_adamw8bit
from leapalign.kernels.adamw8bit.definition import Hyper
from leapalign.kernels.adamw8bit.quantize import BLOCK, blocks_of
from leapalign.kernels.host import native as host

pytestmark = pytest.mark.benchmark(max_time=0.25, min_rounds=5)

COUNT = 2**23  # elements; 16 MiB in bfloat16, so that a step's arrays are larger than most caches
SLOW = 2**18  # for plain torch, which does not depend on caches
HYPER = Hyper(1e-4, 0.9, 0.999, 1e-8, 0.01, 10)
SETS = host.instruction_sets() or ["torch"]  # without the native module torch takes over


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if host.native is None:
        yield request.param
        return
    with host.instruction_set(request.param):
        yield request.param


def drawn(count: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(count, generator=torch.Generator().manual_seed(0))).to(dtype)


def states(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and absmax of both moments as after some steps: none of them is zero."""
    codes_m, codes_v = (torch.arange(count, dtype=torch.int64).mul_(k).remainder_(255).add_(1) for k in (7, 11))
    absmax = torch.full((blocks_of(count),), 1e-3)
    return codes_m.to(torch.uint8), absmax, codes_v.to(torch.uint8), absmax.clone()


def stepping(update: Callable[..., Any], count: int, size: float = 1e-3, **more: Any) -> Callable[[], Any]:
    weights, grads = drawn(count, torch.bfloat16, 0.02), drawn(count, torch.bfloat16, size)
    moments = states(count)
    return lambda: update(weights, grads, *moments, HYPER, seed=1, parameter=0, **more)


def moved_by_update(count: int, extra: int = 0) -> int:
    """Weights, codes read and written, a bf16 gradient read, two absmax of a block read and written."""
    return (2 * 2 + 2 + 4 + extra) * count + 16 * count // BLOCK


# ---- AdamW ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("master", ["stochastic", "residual", "float32"])
def test_adamw8bit(measure: Measure, isa: str, master: str) -> None:
    more: dict[str, tuple[dict[str, Any], int]] = {
        "stochastic": ({}, 0),
        "residual": ({"residual": torch.zeros(COUNT, dtype=torch.int8)}, 2),
        "float32": ({"master": drawn(COUNT, torch.float32, 0.02)}, 8),
    }
    given, extra = more[master]
    step = stepping(host_adamw8bit.update, COUNT, **given, guard=0.0)
    measure(lambda: step().wait(), group=f"adamw8bit, {master}", moved=moved_by_update(COUNT, extra))


def test_adamw8bit_with_ema(measure: Measure, isa: str) -> None:
    average = drawn(COUNT, torch.bfloat16, 0.02)
    step = stepping(host_adamw8bit.update, COUNT, ema=average, ema_decay=0.99, guard=0.0)
    measure(lambda: step().wait(), group="adamw8bit, bf16 average", moved=moved_by_update(COUNT, 4))


def test_adamw8bit_of_subnormal_squares(measure: Measure, isa: str) -> None:
    step = stepping(host_adamw8bit.update, COUNT, 1e-20, guard=0.0)
    measure(lambda: step().wait(), group="adamw8bit, stochastic, subnormal squares", moved=moved_by_update(COUNT))


def test_adamw8bit_reference(measure: Measure) -> None:
    measure(stepping(adamw8bit.update, SLOW), group="adamw8bit, stochastic", moved=moved_by_update(SLOW))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_torch_fused_adamw(measure: Measure, dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(drawn(COUNT, dtype, 0.02))
    parameter.grad = drawn(COUNT, dtype, 1e-3)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    # weights and two moments read and written, the gradient read
    measure(optimizer.step, group="torch fused AdamW", moved=7 * dtype.itemsize * COUNT)


# ---- passes over one or two arrays ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sum_of_squares(measure: Measure, isa: str, dtype: torch.dtype) -> None:
    x = drawn(COUNT, dtype)
    found = measure(lambda: host.sum_of_squares(x), group="sum_of_squares", moved=dtype.itemsize * COUNT)
    assert found == pytest.approx(float(x.double().square().sum()), rel=1e-12)  # both are within 4e-14 of the sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_accumulate(measure: Measure, isa: str, dtype: torch.dtype) -> None:
    total, x = torch.zeros(COUNT, dtype=dtype), drawn(COUNT, torch.bfloat16)
    moved = (2 * dtype.itemsize + 2) * COUNT
    measure(lambda: host.accumulate(total, x).wait(), group="accumulate", moved=moved)


def test_ema(measure: Measure, isa: str) -> None:
    average, weights = drawn(COUNT, torch.bfloat16), drawn(COUNT, torch.bfloat16)
    measure(lambda: host.ema(average, weights, 0.99).wait(), group="ema", moved=6 * COUNT)


def test_copy(measure: Measure, isa: str) -> None:
    to, source = torch.empty(COUNT, dtype=torch.bfloat16), drawn(COUNT, torch.bfloat16)
    measure(lambda: host.copy(to, source).wait(), group="copy", moved=4 * COUNT)
    assert torch.equal(to, source)


def test_round_stochastic(measure: Measure, isa: str) -> None:
    x, out = drawn(COUNT, torch.float32), torch.empty(COUNT, dtype=torch.bfloat16)
    moved = 6 * COUNT
    measure(lambda: host.round_stochastic(x, 1, 2, 3, out=out), group="round_stochastic", moved=moved)
