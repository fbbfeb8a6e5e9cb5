"""Rates are medians of what was timed, of the right bytes; nothing here says how fast anything has to be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from leapalign.engine.planning import rates
from leapalign.engine.planning.rates import CopyRates, HostRates, copy_rates, host_rates, matmul_flops_per_s
from leapalign.engine.planning.workload import Machine
from leapalign.kernels.host.pool import Finished, Handle

MIB = 2**20


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rates, "time", clock)
    return clock


def test_matrix_products_are_counted_with_two_operations_each(clock, monkeypatch):
    monkeypatch.setitem(rates.SIDE, "cpu", 64)
    durations = iter([9.0, 0.5, 0.25, 0.125])  # the first is not counted

    def mm(left, right, out):
        assert left.shape == right.shape == out.shape == (64, 64) and out.dtype == torch.bfloat16
        clock.now += next(durations)

    monkeypatch.setattr(torch, "mm", mm)
    assert matmul_flops_per_s("cpu", seconds=0.8) == 2 * 64**3 / 0.25


def test_host_bytes_are_counted_as_the_machine_counts_them(clock, monkeypatch):
    """A copy reads and writes; an update moves 14 bytes a parameter, whatever it moves."""
    monkeypatch.setattr(rates, "COPIED", MIB)
    monkeypatch.setattr(rates, "UPDATED", (2**19, 2**19))

    def taking(seconds, seen):
        def start(first, *_, threads=None, **__):
            seen.append((first.numel(), threads))
            clock.now += seconds
            return Handle(lambda: Finished(lambda: None), ())

        return start

    copies: list[tuple[int, int]] = []
    updates: list[tuple[int, int]] = []
    monkeypatch.setattr(rates.host, "copy", taking(0.25, copies))
    monkeypatch.setattr(rates.host_adamw8bit, "update", taking(0.125, updates))
    assert host_rates(threads=3, seconds=1.0) == HostRates(2 * MIB / 0.25, 14 * 2**19 / 0.125)
    assert set(copies) == {(MIB, 3)} and set(updates) == {(2**19, 3)}


def test_copies_together_are_those_within_the_others_work():
    class Lane:
        def __init__(self, *times):
            self.times = times

        def issue(self, count):
            assert count == len(self.times) - 1
            return [At(time) for time in self.times]

        def reach(self):
            pass

    class At(float):
        def after(self, other):
            return float(self) - float(other)

    # The slow one's first copy lies within the quick one's three; of the quick one's, all lie within the slow one's.
    quick: Any = Lane(0, 2, 3, 5)
    slow: list[Any] = [Lane(0, 3, 8, 12), Lane(0, 6, 12, 18)]
    assert rates._overlapping(slow[0], quick) == ([3], [2, 1, 2])
    assert rates._overlapping(slow[1], quick) == ([6, 6, 6], [2, 1, 2]), "of none within the other's: all"


def test_measured_rates_are_positive():
    """On the CPU device, with small buffers."""
    found = copy_rates("cpu", nbytes=MIB, seconds=0.01)
    assert isinstance(found, CopyRates)
    assert all(math.isfinite(rate) and rate > 0 for rate in vars(found).values())
    assert 0 < matmul_flops_per_s("cpu", seconds=0.01) < math.inf


def test_an_update_really_runs(monkeypatch):
    monkeypatch.setattr(rates, "COPIED", MIB)
    monkeypatch.setattr(rates, "UPDATED", (2**18, 2**18))
    calls = []
    update = rates.host_adamw8bit.update

    def watched(weights, *arguments, **options):
        calls.append(weights)
        return update(weights, *arguments, **options)

    monkeypatch.setattr(rates.host_adamw8bit, "update", watched)
    found = host_rates(seconds=0.01)
    Machine(host_bytes_per_s=found.in_place)  # refuses what is not above 0 and finite
    assert found.copy > 0
    fresh = torch.randn(2**18, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert not torch.equal(calls[0], fresh)
