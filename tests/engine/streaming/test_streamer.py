"""A streamer's calls: parts of buffers, misuse, failures, its end, and what is reused."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from leapalign.engine.streaming.queues import Event, WorkerThread
from leapalign.engine.streaming.streamer import Streamer
from leapalign.kernels.host.pool import Handle
from tests.engine.streaming.streams import CPU, SIZE, Bench, Later, number


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
