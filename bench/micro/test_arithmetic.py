"""Definitions in torch, and the fused operations beside them: Triton on a GPU, their references on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.kernels.cases import Case, Shapes, cases
from bench.micro.conftest import Measure
from leapalign.kernels.adamw8bit.quantize import BLOCK, blocks_of, dequantize, quantize, signed_map
from leapalign.kernels.rounding import round_stochastic

pytestmark = pytest.mark.benchmark(max_time=0.2, min_rounds=5)

COUNT = 2**20
GPU = torch.cuda.is_available()
SHAPES = Shapes(1024) if GPU else Shapes(128, heads=8, text=64)  # a CPU gets a sequence of 128 tokens of width 1024
WAYS = ("leapalign", "torch eager")


def named() -> dict[str, Case]:
    found = cases(SHAPES, torch.device("cuda" if GPU else "cpu"))
    return {f"{case.name} {case.dtype}": case for case in found}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", named())
def test_operation(measure: Measure, device: str, name: str, way: str) -> None:
    case = named()[name]
    prepare: Any = case.ways[way]
    call = prepare(case.inputs(torch.Generator(device).manual_seed(0)))
    results = measure(call, group=name, moved=case.moved, device=device)
    assert all(result.isfinite().all() for result in results)


def test_quantize(measure: Measure, device: str) -> None:
    x, map = torch.randn(COUNT, device=device), signed_map(torch.device(device))
    codes, absmax = torch.zeros(COUNT, dtype=torch.uint8, device=device), torch.zeros(blocks_of(COUNT), device=device)
    moved = 5 * COUNT + 4 * COUNT // BLOCK
    measure(lambda: quantize(x, codes, absmax, map=map), group="quantize", moved=moved, device=device)
    assert (dequantize(codes, absmax, map=map) - x).abs().max() < x.abs().max()  # it was encoded


def test_round_stochastic(measure: Measure, device: str) -> None:
    x = torch.randn(COUNT, device=device)
    found = measure(lambda: round_stochastic(x, 1, 2, 3), group="round_stochastic", moved=6 * COUNT, device=device)
    assert found.dtype == torch.bfloat16
