"""Queues of work, in order of issue, and events that stand for points in them. Who waits for whom: streamer.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch
from torch import Tensor

from leapalign.kernels.host.pool import Handle

Copies: TypeAlias = Sequence[tuple[Tensor, Tensor]]  # (destination, source) pairs
Delay: TypeAlias = Callable[[str], float]  # queue name -> seconds


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


class HostThreads(Queue):
    """The threads of the host kernels, which work in the order of their handles.

    Attributes:
        handed_over: what they were given last.
    """

    def __init__(self) -> None:
        self.handed_over: Sequence[Handle] = ()

    def mark(self, reuse: Any) -> Sequence[Handle]:
        return self.handed_over

    def reach(self, mark: Sequence[Handle]) -> None:
        for handle in mark:
            handle.wait()

    def close(self) -> None:
        self.reach(self.handed_over)


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
        queue, mark = event.last()
        if isinstance(queue, CurrentStream):
            self.stream.wait_event(mark)
        else:  # no stream can wait for the host
            queue.reach(mark)

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
