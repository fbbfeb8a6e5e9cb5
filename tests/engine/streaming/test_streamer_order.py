"""The order of copies and compute: right under any delays, and every single wait is needed for that."""

from __future__ import annotations

import random
import threading
import time
from functools import partial

import pytest

from leapalign.engine.streaming.queues import WorkerThread
from leapalign.engine.streaming.streamer import Buffer
from tests.engine.streaming.streams import TOUCHES, WAITS, Bench, number


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
