"""Micro-benchmarks of functions: `pytest bench --benchmark-only`, or a part, `pytest bench/micro/test_host.py`.

Each is in a group of those that do the same, and says in its extra_info how many bytes it has to move, GB/s, the
fraction of a plain copy of as many bytes on the same device in the same run, and the device. To see what a change does:

    pytest bench --benchmark-only --benchmark-save=before
    pytest bench --benchmark-only --benchmark-compare=0001 --benchmark-compare-fail=mean:10%

On a GPU the time of a call includes its launch from Python; `python -m bench kernels` leaves that out.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

from bench import record

Measure = Callable[..., Any]
_REPEATS = 5


@pytest.fixture
def measure(benchmark: Any) -> Measure:
    """measure(function, group=..., moved=bytes, device="cpu"): times `function()` and returns what it gives."""

    def run(function: Callable[[], Any], *, group: str, moved: int, device: str = "cpu") -> Any:
        benchmark.group = group
        result = benchmark(_finished(function, device))
        benchmark.extra_info |= {"bytes": moved, "device": _name(device)}
        if benchmark.stats is not None:  # None with --benchmark-disable
            rate = moved / benchmark.stats.stats.median
            benchmark.extra_info |= {"GB/s": rate / 1e9, "fraction of copy": rate / _copy_rate(moved, device)}
        return result

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is the GPU where there is one."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cuda" if torch.cuda.is_available() else "cpu"])


def _finished(function: Callable[[], Any], device: str) -> Callable[[], Any]:
    if device != "cuda":
        return function

    def run() -> Any:
        result = function()
        torch.cuda.synchronize()
        return result

    return run


@functools.cache
def _copy_rate(moved: int, device: str) -> float:
    """Bytes a second, read and written, of a copy that moves so many."""
    source, target = (torch.ones(-(-moved // 2), dtype=torch.uint8, device=device) for _ in range(2))
    copy = _finished(lambda: target.copy_(source), device)
    seconds = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    return moved / median(seconds[1:])


@functools.cache
def _name(device: str) -> str:
    found = record.machine()
    threads = found["threads"]
    return found["gpu"] if device == "cuda" else f"{found['cpu']}, {threads} thread{'s' * (threads > 1)}"
