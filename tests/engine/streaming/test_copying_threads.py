"""A copying thread has no pool of its own and leaves the caller's thread count."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from leapalign.engine.streaming.queues import WorkerThread


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_a_copying_thread_has_no_pool_of_its_own_and_leaves_the_callers_count() -> None:
    found: list[int] = []
    queue = WorkerThread("upload")
    for _ in range(2):  # the count of a thread may change where it first asks
        queue.run(lambda: found.append(torch.get_num_threads()))
    queue.copy([(torch.empty(1 << 20), torch.ones(1 << 20))])
    queue.run(lambda: found.append(torch.get_num_threads()))
    queue.close()
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [*found, torch.get_num_threads()] == [1, 1, 1, 3, 3]


def test_the_callers_thread_count_survives_a_streamer_started_before_anybody_asked() -> None:
    script = (
        "import torch; torch.set_num_threads(3)\n"
        "import threading\n"
        "from leapalign.engine.streaming.queues import WorkerThread\n"
        "def start():\n"
        "    WorkerThread('upload').close(); print(torch.get_num_threads())\n"
        "thread = threading.Thread(target=start); thread.start(); thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]
