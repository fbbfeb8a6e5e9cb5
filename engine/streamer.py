"""Copies between host and device in step with compute: the one owner of streams and events.

Three queues work at once: `in` copies host -> device, `compute` runs the blocks, `out` copies device -> host. Memory
that more than one of them touches is a `Buffer`, and it carries its own events. One rule orders everything:

    Before a queue touches a buffer it waits for the last touch of that buffer by each other queue;
    afterwards it records its own event there.

Touches by one queue follow each other anyway; a caller that changes its current stream between two calls makes the new
one wait for the old one, as for any tensor. An event is always recorded before it is waited on, and a wait is for
what was recorded by then, so queues cannot wait for each other in a circle. There is no `record_stream`.

| device | in, out                                  | compute                                |
|--------|------------------------------------------|----------------------------------------|
| cuda   | a stream each                            | the caller's current stream            |
| cpu    | a worker thread each                     | the calling thread, so `begin` blocks  |
| meta   | nothing to copy: order and shapes only   | the calling thread                     |
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch
from torch import Tensor

from leapalign.engine.arena import HostArena

Copies: TypeAlias = Sequence[tuple[Tensor, Tensor]]  # (destination, source) pairs
Delay: TypeAlias = Callable[[str], float]  # queue name -> seconds

# Whose touches each queue waits for, and under which name it records its own. "host" is the calling thread in
# `settle`: it records nothing, because it is done with the buffer before it can issue anything else.
WAITS = {
    "in": ("consumed", "stored"),
    "compute": ("loaded", "stored"),
    "out": ("loaded", "consumed"),
    "host": ("loaded", "consumed", "stored"),
}
RECORDS = {"in": "loaded", "compute": "consumed", "out": "stored"}


class Queue:
    """Work in order of issue; here all is done when its call returns: compute on the CPU, and everything on meta.

    A mark stands for everything issued up to it.
    """

    def copy(self, pairs: Copies) -> None:
        """Issue the copies (destination, source). Meta tensors hold nothing to copy."""

    def wait(self, event: Event) -> None:
        """What is issued from now on runs after what `event` recorded last. RuntimeError: it never recorded."""
        event.synchronize()

    def mark(self, reuse: Any) -> Any:
        """A mark at this point; `reuse` is the mark it replaces, or None."""

    def reach(self, mark: Any) -> None:
        """Block the calling thread until everything up to the mark is done. Raises what went wrong there."""

    def error(self) -> BaseException | None:
        """What went wrong in this queue; nothing runs in it since. None also on CUDA, which reports its own."""
        return None

    def close(self) -> None:
        """Finish what was issued and end."""


class Event:
    """The last touch of one buffer by one queue. Made once and recorded anew at every touch."""

    def __init__(self) -> None:
        self._last: tuple[Queue, Any] | None = None

    def record(self, queue: Queue) -> None:
        """Take over the queue's present point."""
        self._last = (queue, queue.mark(None if self._last is None else self._last[1]))

    def last(self) -> tuple[Queue, Any]:
        """(queue, mark) of the latest record. RuntimeError: it never recorded."""
        if self._last is None:
            raise RuntimeError("waiting on an event that was never recorded")
        return self._last

    def synchronize(self) -> None:
        """Block the calling thread until the recorded work is done."""
        queue, mark = self.last()
        queue.reach(mark)


class Buffer:
    """Memory that more than one queue touches: a slot on the device, or a region of the host.

    Several regions may guard disjoint parts of one tensor. `loaded`, `consumed` and `stored` are the last touches by
    `in`, `compute` and `out`; None where that queue has never touched it.
    """

    def __init__(self, tensor: Tensor, place: str, owner: Any = None) -> None:
        self.tensor = tensor  # (numel,), contiguous; uint8 where the streamer made it
        self.place = place  # "slot" or "region"
        self.in_use = False  # between `begin` and `end`
        self.loaded: Event | None = None
        self.consumed: Event | None = None
        self.stored: Event | None = None
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
    """

    def __init__(self, device: torch.device, *, delay: Delay | None = None, compute: Queue | None = None) -> None:
        device = torch.device(device)
        assert delay is None or device.type == "cpu", f"delays are for the copies of host threads, not for {device}"
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.device = device
        self._queues = {"in": _copy_queue("in", device, delay), "out": _copy_queue("out", device, delay)}
        self._queues["compute"] = compute or (CurrentStream(device) if device.type == "cuda" else Queue())
        self._buffers: dict[int, Buffer] = {}  # those made here, by id
        self._raised = False
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

    def drain(self) -> None:
        """Block the calling thread until all copies issued so far are done."""
        for name in ("in", "out"):
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


class WorkerThread(Queue):
    """A queue in a host thread: what a stream is to the GPU. Its marks count what has been issued.

    The thread copies alone. With a pool of OpenMP's beside the caller's there would be more threads than cores, and
    OpenMP then sleeps and wakes at every operator of either instead of spinning: twice the time for small ones.
    """

    def __init__(self, name: str, delay: Delay | None = None) -> None:
        self._name = name
        self._delay = delay
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._issued = 0
        self._finished = 0
        self._error: BaseException | None = None
        self._progress = threading.Condition()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"streamer-{name}", daemon=True)
        threads = torch.get_num_threads()
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(threads)  # the caller's again, and the one of threads to come

    def run(self, job: Callable[[], object]) -> None:
        """Issue any work."""
        self._issued += 1
        self._jobs.put(job)

    def copy(self, pairs: Copies) -> None:
        self.run(lambda: self._copy(pairs))

    def wait(self, event: Event) -> None:
        queue, mark = event.last()  # now: later records are not waited for
        self.run(lambda: queue.reach(mark))

    def mark(self, reuse: Any) -> int:
        return self._issued

    def reach(self, mark: int) -> None:
        with self._progress:
            self._progress.wait_for(lambda: self._finished >= mark)
        if self._error is not None:  # what it was to do was perhaps never done
            raise self._error

    def error(self) -> BaseException | None:
        return self._error

    def is_current(self) -> bool:
        """Whether the caller runs in this queue's thread."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _copy(self, pairs: Copies) -> None:
        if self._delay is not None:
            time.sleep(self._delay(self._name))
        for to, source in pairs:
            to.copy_(source)

    @torch.inference_mode()  # the caller's views may have been taken in it; plain tensors are counted as ever
    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread, and of any that has not asked yet: see __init__
        torch.get_num_threads()  # asking makes it last
        self._started.set()
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except BaseException as error:
                self._error = error
            del job  # its tensors must not live until the next one comes
            with self._progress:
                self._finished += 1
                self._progress.notify_all()


class CurrentStream(Queue):
    """Compute on CUDA: whatever stream is current where it is asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def copy(self, pairs: Copies) -> None:
        with torch.cuda.stream(self.stream), torch.no_grad():
            for to, source in pairs:
                to.copy_(source, non_blocking=True)

    def wait(self, event: Event) -> None:
        self.stream.wait_event(event.last()[1])

    def mark(self, reuse: torch.cuda.Event | None) -> torch.cuda.Event:
        event = torch.cuda.Event() if reuse is None else reuse
        event.record(self.stream)
        return event

    def reach(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def close(self) -> None:
        self.stream.synchronize()


class CopyStream(CurrentStream):
    """Copies of one direction on CUDA: a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    @property
    def stream(self) -> torch.cuda.Stream:
        return self._stream

    def follow_current(self) -> None:
        """What is issued from now on runs after all that is in the current stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))


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
