"""Copies between host and device in step with compute: the one owner of streams and events.

Three queues work at once: `in` copies host -> device, `compute` runs the blocks, `out` copies device -> host. Memory
that more than one of them touches is a `Buffer`, and it carries its own events. One rule orders everything:

    Before a queue touches a buffer it waits for the last touch of that buffer by each other queue;
    afterwards it records its own event there.

Touches by one queue follow each other anyway; a caller that changes its current stream between two calls makes the new
one wait for the old one, as for any tensor. An event is always recorded before it is waited on, and a wait is for
what was recorded by then, so queues cannot wait for each other in a circle. There is no `record_stream`.

The host kernels' threads are a fourth party: what is handed over to them (`hand_over`) is a touch too, "updated".

| device | in, out                                  | compute                                |
|--------|------------------------------------------|----------------------------------------|
| cuda   | a stream each                            | the caller's current stream            |
| cpu    | a worker thread each                     | the calling thread, so `begin` blocks  |
| meta   | nothing to copy: order and shapes only   | the calling thread                     |
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from leapalign.engine.memory.arena import HostArena
from leapalign.engine.streaming.queues import (
    Copies,
    CopyStream,
    CurrentStream,
    Delay,
    Event,
    HostThreads,
    Queue,
    WorkerThread,
)
from leapalign.kernels.host.pool import Handle

# Whose touches each queue waits for, and under which name it records its own. "host" is the calling thread in
# `settle`: it records only what it hands over, because it is done with all else before it can issue anything.
WAITS = {
    "in": ("consumed", "stored", "updated"),
    "compute": ("loaded", "stored", "updated"),
    "out": ("loaded", "consumed", "updated"),
    "host": ("loaded", "consumed", "stored", "updated"),
}
RECORDS = {"in": "loaded", "compute": "consumed", "out": "stored", "host": "updated"}


class Buffer:
    """Memory that more than one queue touches: a slot on the device, or a region of the host.

    Several regions may guard disjoint parts of one tensor. `loaded`, `consumed`, `stored` and `updated` are the last
    touches by `in`, `compute`, `out` and the host kernels' threads; None where there was none.
    """

    def __init__(self, tensor: Tensor, place: str, owner: Any = None) -> None:
        self.tensor = tensor  # (numel,), contiguous; uint8 where the streamer made it
        self.place = place  # "slot" or "region"
        self.in_use = False  # between `begin` and `end`
        self.loaded: Event | None = None
        self.consumed: Event | None = None
        self.stored: Event | None = None
        self.updated: Event | None = None
        self._owner = owner  # what keeps the tensor's memory pinned

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def last_touches(self, kinds: Sequence[str]) -> Iterator[tuple[str, Event]]:
        """(kind, event) of those `kinds` that ever happened."""
        for kind in kinds:
            event: Event | None = getattr(self, kind)
            if event is not None:
                yield kind, event

    def release(self) -> None:
        """Let go of the memory; nothing may be under way in it."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if self._owner is not None:
            self._owner.close()
            self._owner = None


class Streamer:
    """Device slots, pinned host memory, and the copies between them.

    Args:
        device: where compute runs. "cuda" without an index is the current one.
        delay: seconds to wait before each copy of the queue it is called with ("in" or "out"), in its worker thread.
            For tests of the order; only on the CPU.
        compute: the queue that `begin` and `end` order; by default the one of the table above.

    A failed copy is raised by the next call that notices, and by every later one; nothing is copied any more.
    RuntimeError, here and below, is a mistake of the engine, never of its user.

    Attributes:
        copied: {"in": bytes issued so far from the host to the device, "out": bytes the other way}.
    """

    def __init__(self, device: torch.device, *, delay: Delay | None = None, compute: Queue | None = None) -> None:
        device = torch.device(device)
        assert delay is None or device.type == "cpu", f"delays are for the copies of host threads, not for {device}"
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.device = device
        self._queues = {"in": _copy_queue("in", device, delay), "out": _copy_queue("out", device, delay)}
        self._queues["compute"] = compute or (CurrentStream(device) if device.type == "cuda" else Queue())
        self._queues["host"] = HostThreads()
        self._buffers: dict[int, Buffer] = {}  # those made here, by id
        self._raised = False
        self.copied = {"in": 0, "out": 0}
        # Copies may be under way when the last user forgets the streamer: they end before the memory goes.
        self._finalizer = weakref.finalize(self, _shut_down, list(self._queues.values()), self._buffers)

    def slot(self, nbytes: int) -> Buffer:
        """Device memory, (nbytes,) uint8, allocated now and kept until `free` or `close`."""
        self._check()
        with torch.inference_mode(False):  # a slot made during sampling serves training too
            buffer = Buffer(torch.empty(nbytes, dtype=torch.uint8, device=self.device), "slot")
        for name in ("in", "out"):
            queue = self._queues[name]
            if isinstance(queue, CopyStream):
                queue.follow_current()  # the allocator may hand out memory that compute is still about to use
        self._buffers[id(buffer)] = buffer
        return buffer

    def host(self, nbytes: int) -> Buffer:
        """Host memory of exactly this size, (nbytes,) uint8, pinned for the device, kept until `free` or `close`."""
        self._check()
        with torch.inference_mode(False):
            if self.device.type == "meta":  # a fake tensor under FakeTensorMode
                buffer = Buffer(torch.empty(nbytes, dtype=torch.uint8), "region")
            else:
                arena = HostArena({"": nbytes}, pin=None if self.device.type == "cuda" else False)
                buffer = Buffer(arena[""], "region", arena)
        self._buffers[id(buffer)] = buffer
        return buffer

    def wrap(self, tensor: Tensor) -> Buffer:
        """A region of the host that exists, or a part of it with a life of its own. `tensor` (numel,) of any dtype."""
        return Buffer(tensor, "region")

    def free(self, buffer: Buffer) -> None:
        """Give the memory of a buffer back; blocks until no queue is at work in it."""
        self.settle(buffer)
        self._buffers.pop(id(buffer), None)
        buffer.release()

    def load(self, slot: Buffer, region: Buffer | Sequence[Buffer], copies: Copies | None = None) -> None:
        """Copy host -> device in the queue `in`.

        Args:
            region: the region, or all the regions, that the sources are parts of.
            copies: (destination in the slot, source in the region) pairs, contiguous and alike in shape and dtype.
                None: the whole region to the front of the slot.
        """
        self._copy("in", slot, region, copies)

    def store(self, region: Buffer | Sequence[Buffer], slot: Buffer, copies: Copies | None = None) -> None:
        """Copy device -> host in the queue `out`; as `load`, with (destination in the region, source in the slot)."""
        if slot.loaded is None and slot.consumed is None:
            raise RuntimeError("store from a slot that nothing was ever written to")
        self._copy("out", slot, region, copies)

    def begin(self, *buffers: Buffer) -> None:
        """Compute waits for the copies of these buffers: to be called before it reads or writes them."""
        self._touch("compute", buffers)
        assert len({id(buffer) for buffer in buffers}) == len(buffers), "the same buffer twice in one begin"
        for buffer in buffers:
            buffer.in_use = True

    def end(self, *buffers: Buffer) -> None:
        """Compute has issued its last use of these buffers; copies may follow."""
        for buffer in buffers:
            if not buffer.in_use:
                raise RuntimeError(f"a {buffer.place} ends that did not begin")
            buffer.in_use = False
        self._record("compute", buffers)

    @contextmanager
    def use(self, *buffers: Buffer) -> Iterator[None]:
        """`begin`, the body, `end`, whatever the body raises."""
        self.begin(*buffers)
        try:
            yield
        finally:
            self.end(*buffers)

    def settle(self, *buffers: Buffer) -> None:
        """Block the calling thread until no queue is at work in the buffers: before the host reads or writes them."""
        self._touch("host", buffers)

    def hand_over(self, work: Callable[[], Iterable[Handle]], *buffers: Buffer) -> None:
        """Settle the buffers and take from `work`, which leaves them to the host kernels' threads.

        Args:
            work: yields handles of what is at work in the buffers. Every queue waits for all of them before it touches
                one of these, and if work raises after some of them, for those.
        """
        self.settle(*buffers)
        queue = self._queues["host"]
        assert isinstance(queue, HostThreads)
        queue.handed_over = handles = []
        try:
            for handle in work():
                handles.append(handle)
        finally:
            self._record("host", buffers)

    def drain(self) -> None:
        """Block the calling thread until all copies issued so far are done, and what was handed over."""
        for name in ("in", "out", "host"):
            queue = self._queues[name]
            queue.reach(queue.mark(None))
        self._check()

    def close(self) -> None:
        """Finish all copies, end the worker threads, free the slots and host memory made here. Idempotent.

        Raises what went wrong in a copy, unless an earlier call has raised it.
        """
        self._finalizer()
        error = self._error()
        if error is not None and not self._raised:
            self._raised = True
            raise error

    def _copy(self, name: str, slot: Buffer, region: Buffer | Sequence[Buffer], copies: Copies | None) -> None:
        regions = [region] if isinstance(region, Buffer) else region
        if copies is None:
            (whole,) = regions
            assert whole.nbytes <= slot.nbytes, f"a region of {whole.nbytes} bytes for a slot of {slot.nbytes}"
            pair = (slot.tensor.view(torch.uint8)[: whole.nbytes], whole.tensor.view(torch.uint8))
            copies = [pair if name == "in" else pair[::-1]]
        for to, source in copies:  # anything else would allocate a temporary on the way
            assert to.shape == source.shape and to.dtype == source.dtype, f"{source.shape} copied to {to.shape}"
            assert to.is_contiguous() and source.is_contiguous(), "a copy of strided memory"
        self._touch(name, [slot, *regions])
        self.copied[name] += sum(to.nbytes for to, _ in copies)
        self._queues[name].copy(tuple(copies))
        self._record(name, [slot, *regions])

    def _touch(self, name: str, buffers: Sequence[Buffer]) -> None:
        self._check()
        for buffer in buffers:
            if buffer.in_use:
                raise RuntimeError(f"{name} touches a {buffer.place} between begin and end")
        for buffer in buffers:
            for kind, event in buffer.last_touches(WAITS[name]):
                self._wait(name, kind, buffer, event)
        self._check()  # a wait on the calling thread may have met a failed copy

    def _wait(self, name: str, kind: str, buffer: Buffer, event: Event) -> None:
        """Every wait there is: queue `name` (or the host) for the touch `kind` of the buffer."""
        if name == "host":
            event.synchronize()
        else:
            self._queues[name].wait(event)

    def _record(self, name: str, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            event = getattr(buffer, RECORDS[name])
            if event is None:
                event = Event()
                setattr(buffer, RECORDS[name], event)
            event.record(self._queues[name])

    def _error(self) -> BaseException | None:
        return next((error for queue in self._queues.values() if (error := queue.error()) is not None), None)

    def _check(self) -> None:
        error = self._error()
        if error is not None:
            self._raised = True
            raise error
        if not self._finalizer.alive:
            raise RuntimeError("the streamer is closed")


def _copy_queue(name: str, device: torch.device, delay: Delay | None) -> Queue:
    if device.type == "cuda":
        return CopyStream(device)
    return WorkerThread(name, delay) if device.type == "cpu" else Queue()


def _shut_down(queues: Sequence[Queue], buffers: dict[int, Buffer]) -> None:
    """Drain and end the queues, then let go of the memory. Works whether or not a copy has failed."""
    if any(isinstance(queue, WorkerThread) and queue.is_current() for queue in queues):
        # The garbage collector happened to run in one of the workers, which cannot wait for itself.
        threading.Thread(target=_shut_down, args=(queues, buffers), name="streamer-close").start()
        return
    for queue in queues:
        queue.close()
    for buffer in buffers.values():
        for _, event in buffer.last_touches(WAITS["host"]):
            if event.last()[0].error() is None:  # compute may be in another stream than the current one
                event.synchronize()
        buffer.release()
    buffers.clear()
