"""A streamer whose waits can be watched and left out, with buffers that hold one number each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leapalign.engine.streaming.queues import Event, WorkerThread
from leapalign.engine.streaming.streamer import Buffer, Streamer
from leapalign.kernels.host.pool import Handle

CPU = torch.device("cpu")
SIZE = 16  # bytes of every buffer here

# By the rule of the module: each queue, and the host, waits for the touches of all others; the host also for what it
# has handed over.
TOUCHES = {"in": "loaded", "compute": "consumed", "out": "stored", "handed over": "updated"}
WAITS = [
    (waiter, kind, place)
    for waiter in ("in", "compute", "out", "host")
    for toucher, kind in TOUCHES.items()
    if toucher != waiter
    for place in ("slot", "region")
]


class Watched(Streamer):
    """Notes every wait, and leaves one of them out."""

    def __init__(self, device: torch.device, without: tuple[str, str, str] | None = None, **settings: Any) -> None:
        super().__init__(device, **settings)
        self.without = without
        self.seen: set[tuple[str, str, str]] = set()

    def _wait(self, name: str, kind: str, buffer: Buffer, event: Event) -> None:
        self.seen.add((name, kind, buffer.place))
        if (name, kind, buffer.place) != self.without:
            super()._wait(name, kind, buffer, event)


class Later(Handle):
    """Work of a thread that stands for the host kernels'."""

    def __init__(self, thread: WorkerThread, work: Callable[[], object]) -> None:
        thread.run(work)
        self._thread, self._mark = thread, thread.mark(None)

    def result(self) -> float:
        self._thread.reach(self._mark)
        return 0.0


class Bench:
    """A streamer whose compute runs in a worker thread, as on a GPU, and buffers that hold one number each."""

    def __init__(
        self, without: tuple[str, str, str] | None = None, delay: Callable[[str], float] | None = None
    ) -> None:
        self.compute, self.threads = WorkerThread("compute"), WorkerThread("host")
        self.streamer = Watched(CPU, without, delay=delay, compute=self.compute)

    def slot(self, value: int) -> Buffer:
        slot = self.streamer.slot(SIZE)
        with self.streamer.use(slot):
            self.compute.run(lambda: slot.tensor.fill_(value))
        self.compute.reach(self.compute.mark(None))
        return slot

    def region(self, value: int) -> Buffer:
        region = self.streamer.host(SIZE)
        region.tensor.fill_(value)
        return region

    def hand_over(self, work: Callable[[], object], *buffers: Buffer) -> None:
        self.streamer.hand_over(lambda: [Later(self.threads, work)], *buffers)

    def drain(self) -> None:
        self.compute.reach(self.compute.mark(None))
        self.threads.reach(self.threads.mark(None))
        self.streamer.drain()

    def close(self) -> None:
        self.streamer.close()
        self.threads.close()


def number(buffer: Buffer) -> int:
    """The number a buffer holds; nothing may be under way in it."""
    value = int(buffer.tensor[0])
    assert (buffer.tensor == value).all()
    return value
