"""The rates of a machine, measured: what `Machine` wants to predict seconds, and what to hold speeds against.

Everything is a median over as many repetitions as the seconds allow, at least two of each. Buffers are larger than
caches. What is timed is what a step does: the copies run in the streamer's own queues and from its own kind of memory,
the host's update is the optimizer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from leapalign.engine.memory.arena import HostArena
from leapalign.engine.planning.traffic import HOST_UPDATE
from leapalign.engine.streaming.queues import CopyStream, CurrentStream, Queue, WorkerThread
from leapalign.kernels.adamw8bit import host as host_adamw8bit
from leapalign.kernels.adamw8bit.definition import Hyper
from leapalign.kernels.adamw8bit.quantize import blocks_of
from leapalign.kernels.host import native as host

COPIED = 256 * 2**20  # bytes a copy: more than a block of FLUX has in 8 bits, less than one in bfloat16
SIDE = {"cuda": 8192, "cpu": 512}  # of the matrices: 1.1 TFLOP, some milliseconds of a GPU; and some of a core
UPDATED = 2**25, 2**21  # parameters of one update, by the native module and in torch: 400 and 25 MB
HYPER = Hyper(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-4, step=1)


@dataclass(frozen=True)
class CopyRates:
    """Bytes a second between host and device, of each direction alone, and of each while the other is at work."""

    h2d: float
    d2h: float
    h2d_together: float
    d2h_together: float


@dataclass(frozen=True)
class HostRates:
    """Bytes a second of the host kernels' threads.

    Attributes:
        copy: of a plain copy, bytes read and bytes written counted both.
        in_place: of the 8-bit update with bfloat16 weights and a float32 gradient, counted as `Machine` counts it:
            its host_bytes_per_s, 14 bytes a parameter.
    """

    copy: float
    in_place: float


def matmul_flops_per_s(device: torch.device | str, *, seconds: float = 1.0) -> float:
    """Operations a second, 2 n³ a product, of bfloat16 matrices (n, n): n = 8192 on a GPU, where three take 384 MiB.

    On a CPU n is 512, and there are as many threads as torch has.
    """
    device = torch.device(device)
    side = SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)

    compute = CurrentStream(device) if device.type == "cuda" else None

    def product() -> float:
        begin = Stamp(compute)
        torch.mm(left, right, out=out)
        end = Stamp(compute)
        end.reach()
        return end.after(begin)

    return 2 * side**3 / median(_repeated(product, seconds))


def copy_rates(device: torch.device | str, *, nbytes: int = COPIED, seconds: float = 1.0) -> CopyRates:
    """Copies by the streamer's queues between a `HostArena`, pinned for a GPU, and memory of the device.

    On the CPU device these are copies by the streamer's two threads, each alone, within host memory.

    Args:
        nbytes: of each copy. The host and the device give twice as much.

    Raises:
        RuntimeError: the pages cannot be locked.
        torch.OutOfMemoryError: the device has no room.
    """
    device = torch.device(device)
    with ExitStack() as stack:
        lanes = []
        for name in ("in", "out"):
            lanes.append(_Lane(device, name, nbytes))
            stack.callback(lanes[-1].close)
        alone = [median(_repeated(lane.one_copy, seconds / 3)) for lane in lanes]
        together: tuple[list[float], list[float]] = ([], [])

        def both() -> None:
            for found, durations in zip(together, _overlapping(*lanes), strict=True):
                found.extend(durations)

        _repeated(both, seconds / 3)
    h2d, d2h = (nbytes / each for each in alone)
    h2d_together, d2h_together = (nbytes / median(each) for each in together)
    return CopyRates(h2d, d2h, h2d_together, d2h_together)


def host_rates(*, threads: int | None = None, seconds: float = 1.0) -> HostRates:
    """A plain copy and the 8-bit update, by the threads that the engine's updates have.

    Args:
        threads: of a call; None: as configured, see `leapalign.kernels.host.native.configure`.
    """
    return HostRates(_copied(threads, seconds / 2), _updated(threads, seconds / 2))


def _copied(threads: int | None, seconds: float) -> float:
    arena = HostArena({"source": COPIED, "target": COPIED}, pin=False)
    source, target = (region.fill_(1) for region in arena.values())  # so that the pages are there
    durations = _repeated(lambda: _wall(lambda: host.copy(target, source, threads=threads).wait()), seconds)
    return 2 * COPIED / median(durations)


def _updated(threads: int | None, seconds: float) -> float:
    count = UPDATED[0] if host.native is not None else UPDATED[1]
    some = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    weights, gradient = some.bfloat16().repeat(count // 2**18), some.repeat(count // 2**18)
    codes_m, codes_v = (torch.zeros(count, dtype=torch.uint8) for _ in range(2))  # zeros are a state of zero moments
    absmax_m, absmax_v = (torch.zeros(blocks_of(count)) for _ in range(2))
    states = codes_m, absmax_m, codes_v, absmax_v

    def update() -> None:
        # The guard is finite, so that the gradient is not read once more to check it: the engine has checked it before.
        host_adamw8bit.update(weights, gradient, *states, HYPER, seed=0, parameter=0, guard=0.0, threads=threads).wait()

    return HOST_UPDATE * count / median(_repeated(lambda: _wall(update), seconds))


# ---- time ----------------------------------------------------------------------------------------------------------


def _repeated(function: Callable[[], Any], seconds: float) -> list[Any]:
    """What the function returns, called twice or more within so many seconds, after one call to warm up."""
    function()
    found: list[Any] = []
    end = time.perf_counter() + seconds
    while len(found) < 2 or time.perf_counter() < end:
        found.append(function())
    return found


def _wall(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Stamp:
    """A point in a queue's work: an event of CUDA, or the time at which a thread got there. Without a queue: now."""

    def __init__(self, queue: Queue | None = None) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if isinstance(queue, CurrentStream):
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(queue.stream)
        elif isinstance(queue, WorkerThread):
            queue.run(self._set)
        else:
            self._set()

    def _set(self) -> None:
        self._time = time.perf_counter()

    def after(self, other: Stamp) -> float:
        """Seconds from the other one to this one; both are reached, and of one kind of queue."""
        if self._event is not None and other._event is not None:
            return float(other._event.elapsed_time(self._event)) / 1e3
        return self._time - other._time

    def reach(self) -> None:
        """Wait for a point in a CUDA stream's work; of a thread's queue its owner does."""
        if self._event is not None:
            self._event.synchronize()


# ---- copies --------------------------------------------------------------------------------------------------------


class _Lane:
    """One direction: its queue, memory on both sides, and when each of its copies began and ended."""

    def __init__(self, device: torch.device, name: str, nbytes: int) -> None:
        cuda = device.type == "cuda"
        self._arena = HostArena({"": nbytes}, pin=cuda)
        here: Tensor = self._arena[""].fill_(1)
        there = torch.ones(nbytes, dtype=torch.uint8, device=device)
        self._pair = (there, here) if name == "in" else (here, there)
        self._queue = CopyStream(device) if cuda else WorkerThread(name)
        if isinstance(self._queue, CopyStream):
            self._queue.follow_current()  # the memory there is being filled

    def issue(self, count: int) -> list[Stamp]:
        """Issue so many copies; the stamps around them."""
        stamps = [Stamp(self._queue)]
        for _ in range(count):
            self._queue.copy((self._pair,))
            stamps.append(Stamp(self._queue))
        return stamps

    def reach(self) -> None:
        """Wait for all copies."""
        queue: Queue = self._queue
        queue.reach(queue.mark(None))

    def one_copy(self) -> float:
        """Seconds of a copy that has the way to itself."""
        begin, end = self.issue(1)
        self.reach()
        return end.after(begin)

    def close(self) -> None:
        self._queue.close()
        self._arena.close()


def _overlapping(*lanes: _Lane, count: int = 3) -> tuple[list[float], ...]:
    """Seconds of each lane's copies that lay wholly within the other's; of all, where there is no such copy."""
    stamps = [lane.issue(count) for lane in lanes]
    for lane in lanes:
        lane.reach()
    first = stamps[0][0]
    times = [[stamp.after(first) for stamp in each] for each in stamps]
    found = []
    for own, other in zip(times, reversed(times), strict=True):
        copies = list(pairwise(own))
        within = [(begin, end) for begin, end in copies if other[0] <= begin and end <= other[-1]]
        found.append([end - begin for begin, end in within or copies])
    return tuple(found)
