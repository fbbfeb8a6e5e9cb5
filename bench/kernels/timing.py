"""Seconds of an operation on a device, away from caches and from the host's own speed.

Successive calls take tensors of their own, together several times the L2 cache, so that every call finds its inputs in
memory. On a GPU the calls are recorded as a CUDA graph with an event on each side: at FLUX's sizes an operation takes
10 µs, less than Python needs to start it. What cannot be recorded is started one by one after the cache is overwritten,
and is marked so: it includes the host's time where that is longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]  # does the operation once, always on the same tensors
WARM_UP = 3
_CACHES = 4  # inputs of successive calls are so many times the L2 cache
_MOST = 64  # sets of inputs


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        seconds: of one call, the median of the measurements.
        spread: the middle half of the measurements, relative to the median.
        recorded: as a CUDA graph.
    """

    seconds: float
    spread: float
    recorded: bool


def sets_of_inputs(moved: int, device: torch.device) -> int:
    """How many sets of inputs an operation that moves so many bytes takes turns with."""
    if device.type != "cuda":
        return 2
    return max(1, min(_MOST, -(-_CACHES * _cache(device) // moved)))


def timed(calls: Sequence[Call], device: torch.device, repeats: int) -> Timing:
    """Time of one of `calls`, all of which do the same. On a GPU the current stream must not be the default one."""
    for _ in range(WARM_UP):
        for call in calls:
            call()
    if device.type != "cuda":
        return _timing([_on_cpu(calls) for _ in range(repeats)], recorded=False)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            results = [call() for call in calls]  # held, so that each has memory of its own
    except RuntimeError:
        torch.cuda.synchronize()
        return _timing([_one_by_one(calls, device) for _ in range(repeats)], recorded=False)
    seconds = [_between_events(graph.replay) / len(calls) for _ in range(WARM_UP + repeats)][WARM_UP:]
    del results
    return _timing(seconds, recorded=True)


def _timing(seconds: list[float], recorded: bool) -> Timing:
    lower, _, upper = quantiles(seconds, n=4)
    return Timing(median(seconds), (upper - lower) / median(seconds), recorded)


def _on_cpu(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def _one_by_one(calls: Sequence[Call], device: torch.device) -> float:
    trash = torch.empty(2 * _cache(device), dtype=torch.uint8, device=device)
    total = 0.0
    for call in calls:
        trash.zero_()
        total += _between_events(call)
    return total / len(calls)


def _between_events(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _cache(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
