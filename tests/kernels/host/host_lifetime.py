"""What becomes of work that was handed over when the process is interrupted, forks or ends: prints what it saw as JSON.

A process of its own, run by test_host_pool.py, because it forks and exits with work pending.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import weakref
from typing import Any

import torch

from leapalign.kernels.host import native as host
from tests.kernels.host.host_runs import busy


class Interrupted(Exception):
    pass


def interrupted_wait() -> dict[str, Any]:
    """A signal arrives while Python waits, and its handler raises."""

    def handler(*_: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGALRM, handler)
    last = busy()
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        last.wait()
        seen = False
    except Interrupted:
        seen = True
    last.wait()  # the work goes on
    return {"interrupted": seen}


def forked() -> dict[str, Any]:
    """A child of a process that has work pending: its own work, its parent's, and its tensors."""
    pending = busy()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        total = torch.ones(5)
        host.accumulate(total, torch.ones(5)).wait()
        found: dict[str, Any] = {"own": total.tolist(), "parent_done": pending.done()}
        try:
            pending.wait()
        except RuntimeError as error:
            found["error"] = str(error)
        array = torch.ones(5).numpy()
        alive = weakref.ref(array)
        handle = host.accumulate(torch.from_numpy(array), torch.ones(5))
        del array
        handle.wait()
        found["kept"] = alive() is not None
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = json.loads(pipe.read())
    _, status = os.waitpid(child, 0)
    pending.wait()  # the parent's goes on
    return found | {"child_status": status}


if __name__ == "__main__":
    assert host.native is not None
    seen = {"isa": host.native.isa(), **interrupted_wait(), **forked()}
    done = busy().done()  # its tensors and its handle are dropped at once, and the process ends
    host.accumulate(torch.from_file(sys.argv[1], shared=True, size=1000), torch.ones(1000))
    print(json.dumps(seen | {"done_at_the_end": done}))
