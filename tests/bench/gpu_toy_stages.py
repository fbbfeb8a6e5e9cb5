"""Stages for tests of `bench gpu`: good ones and broken ones, run in its processes."""

import os
import signal
import time

from bench.gpu.stages import Context, FailedError, SkippedError, UnfinishedError


def fine(context: Context) -> None:
    context.emit({"key": "a", "process": os.getpid()})


def broken(context: Context) -> None:
    raise ZeroDivisionError("this stage is broken")


def dies(context: Context) -> None:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(context: Context) -> None:
    context.emit({"key": "before", "process": os.getpid()})
    time.sleep(600)


def halfway(context: Context) -> None:
    """Gets further each time: "a" and a wrong "b", then the right one."""
    for key in ("a", "b"):
        if key not in context.done:
            context.emit({"key": key, "passed": key == "a" or bool(context.done), "process": os.getpid()})
    if not context.done:
        raise FailedError("b is wrong")


def slow(context: Context) -> None:
    context.emit({"key": "a", "process": os.getpid()})
    raise UnfinishedError("no time for b")


def small(context: Context) -> None:
    raise SkippedError("the card has 24.00GiB")
