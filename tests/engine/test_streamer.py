"""The order of copies and compute: right under any delays, and every single wait is needed for that."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from leapalign.engine.queues import Event, WorkerThread
from leapalign.engine.streamer import Buffer, Streamer
from leapalign.kernels.host_pool import Handle

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


def encounter(waiter: str, kind: str, place: str, *, without: bool, patience: float) -> tuple[bool, bool]:
    """Two queues meet in one buffer, which holds 1: one of them reads, the other writes 2.

    The first touch is held up until the second one (the waiter's) is done, for `patience` seconds at most. Every
    other buffer is used by one of the two only, so that nothing but the wait under test keeps them apart.

    Returns:
        (whether all came as if done in order of issue, whether the second touch overtook the first).
    """
    first = next(queue for queue, touch in TOUCHES.items() if touch == kind)
    copies_in, copies_out = ("in", "out") if place == "slot" else ("out", "in")  # into the buffer, out of it
    if copies_in in (first, waiter):
        writer = copies_in
    elif copies_out in (first, waiter):
        writer = first if waiter == copies_out else waiter
    else:
        writer = first  # and the host, or compute, reads
    held: list[str] = []
    passed, overtaken = threading.Event(), threading.Event()

    def hold_up(queue: str) -> float:
        if queue in held:
            held.remove(queue)
            if passed.wait(patience):
                overtaken.set()
        return 0.0

    bench = Bench((waiter, kind, place) if without else None, hold_up)
    streamer, found = bench.streamer, []
    buffer = bench.slot(1) if place == "slot" else bench.region(1)
    spares = {queue: bench.region(2) if place == "slot" else bench.slot(2) for queue in (first, waiter)}

    def work(queue: str) -> None:
        hold_up(queue)
        if queue == writer:
            buffer.tensor.fill_(2)
        else:
            found.append(number(buffer))

    def touch(queue: str) -> None:
        slot, region = (buffer, spares[queue]) if place == "slot" else (spares[queue], buffer)
        if queue == "in":
            streamer.load(slot, region)
        elif queue == "out":
            streamer.store(region, slot)
        elif queue == "compute":
            with streamer.use(buffer):
                bench.compute.run(lambda: work("compute"))
        elif queue == "handed over":
            bench.hand_over(lambda: work("handed over"), buffer)
        else:
            streamer.settle(buffer)
            work("host")

    held.append(first)
    touch(first)
    touch(waiter)
    if waiter == "host":
        passed.set()
    else:
        queue = streamer._queues[waiter]
        assert isinstance(queue, WorkerThread)  # none of these waits stops the caller
        queue.run(passed.set)
    bench.drain()
    assert not held and passed.is_set()
    reader = waiter if writer == first else first
    read = number(spares[reader]) if reader == copies_out else found[0]
    right = read == (1 if reader == first else 2) and number(buffer) == 2
    bench.close()
    return right, overtaken.is_set()


@pytest.mark.parametrize(("waiter", "kind", "place"), WAITS)
def test_every_wait_keeps_two_queues_apart(waiter: str, kind: str, place: str) -> None:
    assert encounter(waiter, kind, place, without=False, patience=0.05) == (True, False)


@pytest.mark.parametrize(("waiter", "kind", "place"), WAITS)
def test_without_any_one_wait_values_are_wrong(waiter: str, kind: str, place: str) -> None:
    assert encounter(waiter, kind, place, without=True, patience=60.0) == (False, True)


def play(bench: Bench, seed: int) -> None:
    """A random program on three slots and four regions, compared with the same program on plain numbers."""
    draw = random.Random(seed)
    streamer = bench.streamer
    buffers = [bench.slot(i) for i in range(3)] + [bench.region(10 + i) for i in range(4)]
    slots, regions = buffers[:3], buffers[3:]
    numbers = {id(buffer): number(buffer) for buffer in buffers}

    def mix(to: Buffer, source: Buffer, pause: float) -> None:
        time.sleep(pause)
        to.tensor.mul_(3).add_(source.tensor).add_(1)

    for _ in range(30):
        what = draw.choice(["in", "out", "compute", "host", "handed over"])
        slot, region = draw.choice(slots), draw.choice(regions)
        if what == "in":
            streamer.load(slot, region)
            numbers[id(slot)] = numbers[id(region)]
        elif what == "out":
            streamer.store(region, slot)
            numbers[id(region)] = numbers[id(slot)]
        elif what in ("compute", "handed over"):
            to, source = draw.sample(buffers, 2)
            pause = draw.choice([0, 0, 0.0003])
            if what == "compute":
                with streamer.use(to, source):
                    bench.compute.run(partial(mix, to, source, pause))
            else:
                bench.hand_over(partial(mix, to, source, pause), to, source)
            numbers[id(to)] = (3 * numbers[id(to)] + numbers[id(source)] + 1) % 256
        else:
            buffer = draw.choice(buffers)
            streamer.settle(buffer)
            assert number(buffer) == numbers[id(buffer)]
            buffer.tensor.add_(7)
            numbers[id(buffer)] = (numbers[id(buffer)] + 7) % 256
    bench.drain()
    assert [number(buffer) for buffer in buffers] == [numbers[id(buffer)] for buffer in buffers]


def random_delay(draw: random.Random, queue: str) -> float:
    return draw.choice([0, 0, 0.0003])


def test_random_programs_under_random_delays() -> None:
    seen = set()
    for seed in range(200):
        bench = Bench(delay=partial(random_delay, random.Random(-seed)))
        play(bench, seed)
        seen |= bench.streamer.seen
        bench.close()
    assert seen == set(WAITS)  # so these are all the waits that there are to be left out above


@pytest.fixture
def streamer() -> Iterator[Streamer]:
    streamer = Streamer(CPU)
    yield streamer
    streamer.close()


def test_part_of_a_slot_from_parts_of_a_region_of_another_dtype(streamer: Streamer) -> None:
    store = torch.arange(8, dtype=torch.bfloat16)
    region, slot = streamer.wrap(store), streamer.slot(32)
    parts = slot.tensor[16:].view(torch.bfloat16)
    streamer.load(slot, region, [(parts[:2], store[6:]), (parts[2:4], store[:2])])
    with streamer.use(slot):
        assert parts[:4].tolist() == [6, 7, 0, 1]
        parts.add_(1)
    streamer.store(region, slot, [(store[2:4], parts[:2])])
    streamer.settle(region)
    assert store.tolist() == [0, 1, 7, 8, 4, 5, 6, 7]
    streamer.load(slot, region)  # whole: to the front
    with streamer.use(slot):
        assert torch.equal(slot.tensor[:16].view(torch.bfloat16), store)


def test_regions_of_one_tensor_wait_each_for_its_own_copies() -> None:
    opened, read = threading.Event(), threading.Event()
    bench = Bench(delay=lambda queue: float(queue == "out" and not opened.wait(60)))
    streamer, memory, slot = bench.streamer, bench.region(1).tensor, bench.streamer.slot(SIZE)
    halves = [streamer.wrap(memory[:8]), streamer.wrap(memory[8:])]
    streamer.store(halves[0], bench.slot(2))
    streamer.load(slot, halves[1])
    with streamer.use(slot):
        bench.compute.run(read.set)
    assert read.wait(60)  # one half has come in while the copy to the other one stood still
    streamer.load(slot, halves, [(slot.tensor, memory)])  # this one waits
    opened.set()
    bench.drain()
    assert slot.tensor.tolist() == [2] * 8 + [1] * 8
    streamer.close()


def test_waiting_on_what_was_never_recorded_is_an_error(streamer: Streamer) -> None:
    event = Event()
    with pytest.raises(RuntimeError, match="never recorded"):
        event.synchronize()
    for queue in streamer._queues.values():
        with pytest.raises(RuntimeError, match="never recorded"):
            queue.wait(event)
    slot = streamer.slot(SIZE)
    slot.loaded = event
    with pytest.raises(RuntimeError, match="never recorded"):
        streamer.begin(slot)
    slot.loaded = None


def test_misuse_is_an_error(streamer: Streamer) -> None:
    slot, region = streamer.slot(SIZE), streamer.host(SIZE)
    with pytest.raises(RuntimeError, match="nothing was ever written"):
        streamer.store(region, slot)
    with pytest.raises(RuntimeError, match="did not begin"):
        streamer.end(slot)
    streamer.load(slot, region)
    with streamer.use(slot):
        for misuse in (
            lambda: streamer.begin(slot),
            lambda: streamer.load(slot, region),
            lambda: streamer.store(region, slot),
            lambda: streamer.settle(slot),
            lambda: streamer.free(slot),
        ):
            with pytest.raises(RuntimeError, match="between begin and end"):
                misuse()
    with pytest.raises(AssertionError, match="20 bytes for a slot of 16"):
        streamer.load(slot, streamer.host(20))
    with pytest.raises(AssertionError, match="strided"):
        streamer.load(slot, region, [(slot.tensor[::2], region.tensor[::2])])
    with pytest.raises(AssertionError, match="twice in one begin"):
        streamer.begin(slot, slot)
    streamer.load(slot, region)  # nothing of this has left a mark
    streamer.close()
    with pytest.raises(RuntimeError, match="closed"):
        streamer.load(slot, region)


def test_an_error_in_the_body_ends_the_use(streamer: Streamer) -> None:
    slot = streamer.slot(SIZE)
    with pytest.raises(KeyError), streamer.use(slot):
        raise KeyError
    streamer.load(slot, streamer.host(SIZE))


class CopyError(Exception):
    pass


def failing(queue: str) -> float:
    if queue == "in":
        raise CopyError
    return 0.0


def test_work_that_breaks_off_is_waited_for_as_far_as_it_got() -> None:
    bench = Bench()
    region = bench.region(1)

    def first() -> None:
        time.sleep(0.05)
        region.tensor.fill_(2)

    def work() -> Iterator[Handle]:
        yield Later(bench.threads, first)
        raise ValueError("the second piece")

    with pytest.raises(ValueError, match="the second piece"):
        bench.streamer.hand_over(work, region)
    bench.streamer.settle(region)
    found = number(region)
    bench.close()
    assert found == 2


def test_a_failed_copy_is_raised_where_it_is_noticed_and_ever_after() -> None:
    streamer = Streamer(CPU, delay=failing)
    slot, region, other = streamer.slot(SIZE), streamer.host(SIZE), streamer.host(SIZE)
    other.tensor.fill_(5)
    streamer.load(slot, region)
    with pytest.raises(CopyError):  # here, or earlier if the worker was quick
        streamer.settle(slot)
    for call in (lambda: streamer.begin(slot), lambda: streamer.load(slot, region), lambda: streamer.slot(SIZE)):
        with pytest.raises(CopyError):
            call()
    streamer.close()  # it has been raised
    assert not slot.in_use and slot.tensor.numel() == 0


def test_a_store_of_what_failed_to_arrive_does_not_happen() -> None:
    arrive = threading.Event()

    def delay(queue: str) -> float:
        if queue == "in":
            arrive.wait(60)
            raise CopyError
        return 0.0

    streamer = Streamer(CPU, delay=delay)
    kept = torch.full((SIZE,), 5, dtype=torch.uint8)
    slot = streamer.slot(SIZE)
    streamer.load(slot, streamer.host(SIZE))
    streamer.store(streamer.wrap(kept), slot)
    arrive.set()
    with pytest.raises(CopyError):
        streamer.close()
    streamer.close()
    assert kept.tolist() == [5] * SIZE


def threads_of(streamer: Streamer) -> list[threading.Thread]:
    return [queue._thread for queue in streamer._queues.values() if isinstance(queue, WorkerThread)]


def test_closing_finishes_the_copies_ends_the_threads_and_frees_the_memory() -> None:
    streamer = Streamer(CPU, delay=lambda _: 0.01)
    threads = threads_of(streamer)
    slot, region, mine = streamer.slot(SIZE), streamer.host(SIZE), torch.zeros(SIZE, dtype=torch.uint8)
    region.tensor.fill_(3)
    memory = [StorageWeakRef(buffer.tensor.untyped_storage()) for buffer in (slot, region)]
    streamer.load(slot, region)
    streamer.store(streamer.wrap(mine), slot)
    streamer.close()
    streamer.close()
    assert mine.tolist() == [3] * SIZE
    assert not any(thread.is_alive() for thread in threads)
    assert all(storage.expired() for storage in memory)  # though `slot` and `region` are still held


def test_a_forgotten_streamer_finishes_its_copies_and_ends_its_threads() -> None:
    streamer = Streamer(CPU, delay=lambda _: 0.01)
    threads = threads_of(streamer)
    slot, region = streamer.slot(SIZE), torch.full((SIZE,), 4, dtype=torch.uint8)
    streamer.load(slot, streamer.wrap(region))
    mine = torch.zeros(SIZE, dtype=torch.uint8)
    streamer.store(streamer.wrap(mine), slot)
    storage = StorageWeakRef(slot.tensor.untyped_storage())
    del streamer, slot
    gc.collect()
    assert mine.tolist() == [4] * SIZE
    assert not any(thread.is_alive() for thread in threads) and storage.expired()


def test_a_streamer_collected_in_its_own_worker_closes_all_the_same() -> None:
    streamer = Streamer(CPU)
    slot, mine = streamer.slot(SIZE), torch.zeros(SIZE, dtype=torch.uint8)
    threads, worker = threads_of(streamer), streamer._queues["in"]
    assert isinstance(worker, WorkerThread)
    forgotten = threading.Event()
    last = [streamer]
    with streamer.use(slot):
        slot.tensor.fill_(6)
    worker.run(lambda: forgotten.wait(60) and last.pop() and None)
    streamer.store(streamer.wrap(mine), slot)
    del streamer
    forgotten.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert mine.tolist() == [6] * SIZE


def test_freed_buffers_are_given_back_when_their_copies_are_done() -> None:
    streamer = Streamer(CPU, delay=lambda _: 0.01)
    slot, region = streamer.slot(SIZE), streamer.host(SIZE)
    region.tensor.fill_(8)
    kept = torch.zeros(SIZE, dtype=torch.uint8)
    streamer.load(slot, region)
    streamer.store(streamer.wrap(kept), slot)
    storage = StorageWeakRef(slot.tensor.untyped_storage())
    streamer.free(slot)
    streamer.free(region)
    assert kept.tolist() == [8] * SIZE and not streamer._buffers
    streamer.drain()
    assert storage.expired()
    streamer.close()


def test_in_steady_state_no_event_or_memory_is_new(streamer: Streamer) -> None:
    slots = [streamer.slot(SIZE) for _ in range(2)]
    region = streamer.host(SIZE)

    def rounds() -> list[int]:
        for slot in 3 * slots:
            streamer.load(slot, region)
            with streamer.use(slot):
                slot.tensor.add_(1)
            streamer.store(region, slot)
        streamer.drain()
        assert len(streamer._buffers) == 3
        return [id(x) for b in (*slots, region) for x in (b.tensor, b.loaded, b.consumed, b.stored)]

    assert rounds() == rounds()
    assert number(region) == 12


def test_a_graph_over_one_slot_survives_copies_into_others(streamer: Streamer) -> None:
    weights = torch.linspace(1, 2, 4)
    slots = [streamer.slot(SIZE) for _ in range(2)]
    for slot in slots:
        streamer.load(slot, streamer.wrap(weights))
    x = torch.ones(4, requires_grad=True)
    with streamer.use(slots[0]):
        y = x * slots[0].tensor.view(torch.float32)  # saves the slot's view
        streamer.load(slots[1], streamer.wrap(weights))
        streamer.drain()
        y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights)


def test_autograd_notices_a_copy_into_a_slot_that_a_graph_still_needs(streamer: Streamer) -> None:
    slot, region = streamer.slot(SIZE), streamer.host(SIZE)
    x = torch.ones(4, requires_grad=True)
    with streamer.use(slot):
        y = x * slot.tensor.view(torch.float32)
    streamer.load(slot, region)
    streamer.drain()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_made_during_sampling_serves_training_too(streamer: Streamer) -> None:
    with torch.inference_mode():
        slot, region = streamer.slot(SIZE), streamer.host(SIZE)
        streamer.load(slot, region)
        with streamer.use(slot):
            slot.tensor.add_(1)
    streamer.store(region, slot)
    streamer.settle(region)
    assert not slot.tensor.is_inference() and not region.tensor.is_inference()
    x = torch.ones(4, requires_grad=True)
    (x * slot.tensor.view(torch.float32)).sum().backward()


def test_on_meta_the_same_calls_move_nothing() -> None:
    with FakeTensorMode():
        streamer = Streamer(torch.device("meta"))
        slot, region = streamer.slot(1 << 40), streamer.host(1 << 40)  # a terabyte each
        streamer.load(slot, region)
        with pytest.raises(RuntimeError, match="between begin and end"), streamer.use(slot):
            streamer.load(slot, region)
        streamer.store(region, slot)
        streamer.settle(region)
        assert slot.tensor.device.type == "meta" and region.tensor.device.type == "cpu"
        streamer.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies by streams: needs a GPU")
def test_on_a_gpu_the_order_is_that_of_issue() -> None:
    streamer = Streamer(torch.device("cuda"))
    size = 1 << 24
    slots, regions = [streamer.slot(size) for _ in range(2)], [streamer.host(size) for _ in range(6)]
    for i, region in enumerate(regions):
        region.tensor.fill_(i)
    for _ in range(10):
        for i, region in enumerate(regions):
            slot = slots[i % 2]
            streamer.load(slot, region)
            with streamer.use(slot):
                torch.cuda._sleep(1_000_000)
                slot.tensor.add_(1)
            streamer.store(region, slot)
    streamer.settle(*regions)
    assert [number(region) for region in regions] == [10, 11, 12, 13, 14, 15]
    streamer.close()


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
        "from leapalign.engine.queues import WorkerThread\n"
        "def start():\n"
        "    WorkerThread('upload').close(); print(torch.get_num_threads())\n"
        "thread = threading.Thread(target=start); thread.start(); thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]
