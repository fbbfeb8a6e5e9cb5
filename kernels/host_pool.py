"""Work handed over to the host kernels' threads, and how to wait for it."""

from __future__ import annotations

import os
import threading
from collections import deque
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


_unfinished: deque[Handle] = deque()  # in the order of the jobs, which they end in
_lock = threading.Lock()


def _forget() -> None:
    """In a child of a fork: its parent's work never ends there, and the parent may have held the lock."""
    global _lock
    _lock = threading.Lock()
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
        with _lock:  # so that the queue here has the order of the threads'
            self._job = start()
            _unfinished.append(self)
        _release()

    def done(self) -> bool:
        """Whether the work is done, or has failed. Never blocks."""
        return self._job.done()

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
            return self._job.wait()
        finally:
            _release()


def _release() -> None:
    """Forget tensors of what is done."""
    with _lock:
        while _unfinished and _unfinished[0].done():
            _unfinished.popleft()._tensors = ()
