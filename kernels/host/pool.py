"""Work handed over to the host kernels' threads, and how to wait for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Job(Protocol):
    """Work in progress: `_host.Job`, or `Finished` where torch has done it."""

    def done(self) -> bool: ...

    def wait(self) -> float: ...


class Finished:
    """Work that was done when it was handed over."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._error: Exception | None = None
        try:
            with torch.no_grad():
                work()
        except Exception as error:
            self._error = error

    def done(self) -> bool:
        return True

    def wait(self) -> float:
        if self._error is not None:
            raise self._error
        return 0.0


_unfinished: dict[Handle, None] = {}  # in the order of the jobs, which they end in
_lock = threading.RLock()  # a collection or a signal may come while it is held, and what they run may wait for work


def _forget() -> None:
    """In a child of a fork: its parent's work never ends there, and the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()
    _unfinished.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Handle:
    """Work that was handed over: it runs by itself, after all that was handed over before it.

    Its tensors are kept until it is done, whether or not the handle is. Until then they belong to it: who reads or
    writes them, or frees memory that they are only views of, waits first.
    """

    def __init__(self, start: Callable[[], Job], tensors: tuple[Tensor | None, ...]) -> None:
        self._tensors = tensors
        self._job: Job | None = None
        with _lock:  # so that the queue here has the order of the threads'
            _unfinished[self] = None  # before it starts: an interrupt must not free what the threads read by then
            self._job = start()
        _release()

    def done(self) -> bool:
        """Whether the work is done, or has failed. Never blocks."""
        return self._started.done()

    def wait(self) -> None:
        """Block until the work is done, without Python's lock.

        Raises:
            FloatingPointError: the gradient of an update is not finite.
            RuntimeError: the work was handed over before this process was forked.
        """
        self.result()

    def result(self) -> float:
        """`wait`, and return what the work has computed: a sum, or 0. Raises as `wait` does."""
        try:
            return self._started.wait()
        finally:
            _release()

    @property
    def _started(self) -> Job:
        assert self._job is not None, "a handle that was never returned"
        return self._job


def _release() -> None:
    """Forget tensors of what is done: of every handle up to the last one whose job is done.

    One without a job was refused, or an interrupt came in between: it ends with the one behind it.
    """
    done: list[Handle] = []
    unsure: list[Handle] = []
    with _lock:
        for handle in list(_unfinished):
            unsure.append(handle)
            if handle._job is None:
                continue
            if not handle._job.done():
                break
            done += unsure
            unsure = []
        for handle in done:
            _unfinished.pop(handle, None)
    for handle in done:
        handle._tensors = ()
