"""What was written to rows of a step's states is what is read from them, wherever they are kept."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from leapalign.engine.streaming.activations import Placement, SampleStates, Staging
from leapalign.engine.streaming.streamer import Buffer, Streamer

CPU = torch.device("cpu")
SPECS = [((2, 3), torch.float32), ((5,), torch.bfloat16)]
PLACEMENTS: list[Placement] = ["device", "host"]


class Counting(Streamer):
    """Notes how many pieces each load and each store copies."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(CPU, **settings)
        self.loads: list[int] = []
        self.stores: list[int] = []

    def load(self, slot: Buffer, region: Any, copies: Any = None) -> None:
        self.loads.append(len(copies))
        super().load(slot, region, copies)

    def store(self, region: Any, slot: Buffer, copies: Any = None) -> None:
        self.stores.append(len(copies))
        super().store(region, slot, copies)


@pytest.fixture
def streamer() -> Iterator[Counting]:
    streamer = Counting()
    yield streamer
    streamer.close()


def values(numbers: Sequence[float], specs: Sequence[Any] = SPECS, device: torch.device = CPU) -> list[Tensor]:
    """For each spec (len(numbers), *shape), each row filled with its number, negative in every other spec."""
    rows = torch.tensor(numbers, dtype=torch.float64, device=device)
    return [
        ((-1) ** i * rows).view(-1, *[1] * len(shape)).expand(-1, *shape).to(dtype)
        for i, (shape, dtype) in enumerate(specs)
    ]


def check(found: Sequence[Tensor], numbers: Sequence[float], specs: Sequence[Any] = SPECS) -> None:
    expected = values(numbers, specs)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b)


def random_delay(draw: random.Random, queue: str) -> float:
    return draw.choice([0, 0, 0, 0.0003])


def some_rows(draw: random.Random, rows: int) -> list[int] | slice:
    if draw.random() < 0.5:
        return draw.sample(range(rows), draw.randint(1, rows))
    start = draw.randrange(rows)
    return slice(start, draw.randint(start + 1, rows))


class Model:
    """States beside the plain numbers that their rows should hold."""

    def __init__(self, staging: Staging, draw: random.Random) -> None:
        self.draw = draw
        self.specs = draw.choice([SPECS, SPECS[:1], [((7,), torch.float64), ((), torch.uint8), ((0, 2), torch.int32)]])
        self.numbers: list[int | None] = [None] * draw.randint(1, 6)
        self.states: SampleStates | None = staging.states(draw.choice(PLACEMENTS), len(self.numbers), self.specs)

    def step(self) -> None:
        """Write some rows, or begin to fetch some, or read some: the latter with other reads inside."""
        assert self.states is not None
        draw, rows = self.draw, some_rows(self.draw, len(self.numbers))
        index = list(range(len(self.numbers)))[rows] if isinstance(rows, slice) else rows
        what = draw.random()
        if what < 0.4:
            written = [draw.randrange(100) if len(self.specs) < 3 else 0 for _ in index]
            self.states.write(rows, values(written, self.specs))
            for row, number in zip(index, written, strict=True):
                self.numbers[row] = number
        elif what < 0.6:
            self.states.prefetch(rows)
        else:
            with ExitStack() as stack:
                opened = []
                for _ in range(draw.choice([1, 1, 2, 3])):
                    known = [row for row in index if self.numbers[row] is not None]
                    known += draw.choices(known, k=draw.choice([0, 0, 2])) if known else []  # a row may come twice
                    if draw.random() < 0.5:
                        self.states.prefetch(rows)
                    opened.append((stack.enter_context(self.states.read(known)), known))
                for found, known in opened:
                    check(found, [self.numbers[row] or 0 for row in known], self.specs)


@pytest.mark.parametrize("slots", [2, 6])
def test_random_programs_under_random_delays(slots: int) -> None:
    for seed in range(100):
        draw = random.Random(seed)
        streamer = Streamer(CPU, delay=partial(random_delay, random.Random(-seed)))
        staging = Staging(streamer, slots)
        models = [Model(staging, draw) for _ in range(3)]
        for _ in range(40):
            i = draw.randrange(len(models))
            models[i].step()
            if draw.random() < 0.05:  # dropped, or forgotten
                states, models[i].states = models[i].states, None
                if states is not None and draw.random() < 0.5:
                    states.drop()
                del states
                models[i] = Model(staging, draw)
        assert len(staging._ring) <= max(slots, 4)  # three readers and one more
        streamer.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_are_read_as_they_were_written(streamer: Counting, placement: Placement) -> None:
    states = Staging(streamer).states(placement, 5, SPECS)
    states.write(slice(0, 3), values([1, 2, 3]))
    states.write([4], [v.double() for v in values([5])])  # cast
    with states.read([4, 0, 1]) as found:
        check(found, [5, 1, 2])
    with states.read(slice(None, 3)) as found, states.read([2]) as again:
        check(found, [1, 2, 3])
        check(again, [3])
    with pytest.raises(RuntimeError, match=r"rows \[3\] are read, but were never written"), states.read(slice(None)):
        pass
    states.prefetch([3])  # nothing there yet: nothing to do
    with pytest.raises(AssertionError, match=r"rows \(5,\) of 5"):
        states.prefetch([5])
    with pytest.raises(AssertionError, match="written twice"):
        states.write([1, 1], values([1, 2]))
    with pytest.raises(AssertionError, match=r"\(1, 2, 3\) for rows \(0, 1\)"):
        states.write([0, 1], values([1]))
    states.write([], values([]))
    with states.read([]) as found:
        check(found, [])


def test_values_may_be_overwritten_once_they_are_written(streamer: Counting) -> None:
    for placement in PLACEMENTS:
        states = Staging(streamer).states(placement, 1, SPECS)
        given = [v.clone() for v in values([1])]
        states.write([0], given)
        for value in given:
            value.zero_()
        with states.read([0]) as found:
            check(found, [1])


def test_what_was_prefetched_is_not_loaded_again_and_neighbours_travel_together(streamer: Counting) -> None:
    states = Staging(streamer, slots=2).states("host", 6, SPECS)
    for row in range(6):
        states.write([row], values([row]))
    assert streamer.stores == [2] * 6  # one piece a spec
    states.prefetch(slice(0, 3))
    states.prefetch([0, 1, 2])
    with states.read(slice(0, 3)) as found:
        check(found, [0, 1, 2])
    assert streamer.loads == [2]
    with states.read([3, 4, 1, 5]) as found:  # three runs in two tensors
        check(found, [3, 4, 1, 5])
    assert streamer.loads == [2, 6]


def test_what_has_just_been_written_need_not_come_back_from_the_host(streamer: Counting) -> None:
    states = Staging(streamer).states("host", 2, SPECS)
    for number in range(3):
        states.write(slice(None), values([number, number + 1]))
        with states.read(slice(None)) as found:
            check(found, [number, number + 1])
    assert streamer.loads == []


def test_a_prefetch_is_given_up_when_its_rows_change(streamer: Counting) -> None:
    states = Staging(streamer).states("host", 3, SPECS)
    states.write(slice(None), values([1, 2, 3]))
    for rows in ([0], [1, 0], [2]):
        states.prefetch(rows)
    states.write([0], values([9]))
    for rows, numbers in (([0], [9]), ([1, 0], [2, 9]), ([2], [3])):
        with states.read(rows) as found:
            check(found, numbers)


def test_a_prefetch_keeps_its_slot_until_it_is_read_or_forgotten(streamer: Counting) -> None:
    staging = Staging(streamer, slots=2)
    forgotten, states = (staging.states("host", 3, SPECS) for _ in range(2))
    for row in (0, 1):
        forgotten.write([row], values([row]))
    forgotten.prefetch([1])
    del forgotten
    gc.collect()
    states.write([0], values([5]))
    states.prefetch([0])
    for row in (1, 2, 1):  # all through the other slot
        states.write([row], values([row]))
    with states.read([0]) as found:
        check(found, [5])
    assert streamer.loads == []
    states.prefetch([2])
    states.prefetch([1])
    with states.read([1]) as found:
        check(found, [1])
    before = len(streamer.loads)
    states.write([0], values([6]))  # through the slot that has been read
    with states.read([2]) as found:
        check(found, [2])
    assert len(streamer.loads) == before


def test_what_is_being_read_stays_while_its_rows_change_on_the_host(streamer: Counting) -> None:
    states = Staging(streamer).states("host", 2, SPECS)
    states.write(slice(None), values([1, 2]))
    with states.read([0]) as before:
        states.write([0], values([7]))
        with states.read([0]) as after:
            check(after, [7])
        check(before, [1])


def test_two_readers_two_prefetches_and_writes_share_six_slots_for_good(streamer: Counting) -> None:
    staging = Staging(streamer)

    def step(rows: int, microbatch: int) -> None:
        inputs, cotangents = (staging.states("host", rows, SPECS) for _ in range(2))
        parts = [slice(start, min(start + microbatch, rows)) for start in range(0, rows, microbatch)]
        for part in parts:
            for states in (inputs, cotangents):
                states.write(part, values(list(range(rows))[part]))
        before = len(streamer.loads)
        for here, following in zip(parts, [*parts[1:], None], strict=True):
            with inputs.read(here) as x, cotangents.read(here) as c:
                if following is not None:
                    inputs.prefetch(following)
                    cotangents.prefetch(following)
                cotangents.write(here, [a + b for a, b in zip(x, c, strict=True)])
        assert len(streamer.loads) - before <= 2 * len(parts)  # none was given up and loaded again
        with cotangents.read(slice(None)) as found:
            check(found, [2 * number for number in range(rows)])
        inputs.drop()
        cotangents.drop()
        cotangents.drop()

    step(8, 1)
    sizes = []
    for rows, microbatch in ((8, 2), (5, 2), (8, 1), (12, 3), (12, 3)):
        step(rows, microbatch)
        sizes.append(sum(buffer.nbytes for buffer in streamer._buffers.values()))
        assert len(staging._ring) == 6
        assert len(staging._homes) == 2
    assert sizes[0] <= sizes[1] <= sizes[2] <= sizes[3] == sizes[4]


def test_in_steady_state_nothing_is_allocated(streamer: Counting) -> None:
    staging = Staging(streamer)

    def step() -> None:
        states = staging.states("host", 4, SPECS)
        for row in range(4):
            states.write([row], given[row])
        for row in range(4):
            with states.read([row]):
                states.prefetch([(row + 1) % 4])
        states.drop()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    given, seen = [values([row]) for row in range(4)], set[str]()
    for _ in range(3):
        step()
    before = [(id(buffer), buffer.tensor.data_ptr()) for buffer in streamer._buffers.values()]
    with Operations():
        for _ in range(3):
            step()
    assert seen <= {"slice", "view", "copy_", "detach", "alias", "_unsafe_view"}, seen
    assert [(id(buffer), buffer.tensor.data_ptr()) for buffer in streamer._buffers.values()] == before


def test_host_memory_is_reused_and_never_more_than_was_in_use_at_once(streamer: Counting) -> None:
    staging = Staging(streamer)

    def homes() -> int:
        return sum(buffer.place == "region" for buffer in streamer._buffers.values())

    first = staging.states("host", 4, SPECS)
    memory = first._tensors[0].data_ptr()
    first.drop()
    second = staging.states("host", 3, SPECS)  # another layout in the same memory
    assert second._tensors[0].data_ptr() == memory and homes() == 1
    with pytest.raises(AssertionError), first.read([0]):
        pass
    del second
    gc.collect()
    larger = staging.states("host", 400, SPECS)  # takes the place of the smaller one
    assert homes() == 1
    also = staging.states("host", 2, SPECS)
    assert homes() == 2
    del larger, also


def test_a_block_input_can_be_differentiated_while_the_next_one_comes_in(streamer: Counting) -> None:
    for placement in PLACEMENTS:
        states = Staging(streamer, slots=2).states(placement, 4, SPECS[:1])
        for row in range(4):
            states.write([row], values([row + 1], SPECS[:1]))
        for row in range(4):
            with states.read([row]) as (x,):
                leaf = x.detach().requires_grad_()
                y = (leaf**3).sum()
                if row < 3:
                    states.prefetch([row + 1])
                    streamer.drain()
                (gradient,) = torch.autograd.grad(y, [leaf])
                assert torch.equal(gradient, torch.full((1, 2, 3), 3.0 * (row + 1) ** 2))


def test_what_is_made_during_sampling_serves_training_too(streamer: Counting) -> None:
    staging = Staging(streamer)
    for placement in PLACEMENTS:
        with torch.inference_mode():
            states = staging.states(placement, 2, SPECS)
            states.write(slice(None), values([1, 2]))
            with states.read([1]) as found:
                check(found, [2])
        states.write([0], values([3]))
        with states.read([1, 0]) as found:
            check(found, [2, 3])
            leaf = found[0].detach().requires_grad_()
            (leaf * found[0]).sum().backward()


def test_it_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        streamer = Streamer(torch.device("meta"))
        staging = Staging(streamer)
        specs = [((1 << 20, 1 << 10), torch.bfloat16), ((3,), torch.float32)]  # 2 GiB a row
        for placement in PLACEMENTS:
            states = staging.states(placement, 100, specs)
            for row in range(0, 100, 10):
                states.write(
                    slice(row, row + 10),
                    [torch.empty(10, *shape, dtype=dtype, device="meta") for shape, dtype in specs],
                )
            states.prefetch([3, 4])
            with states.read([3, 4]) as (x, y), states.read([7, 5, 3]) as (u, _):
                assert x.shape == (2, 1 << 20, 1 << 10) and x.device.type == "meta" and y.dtype == torch.float32
                assert u.shape == (3, 1 << 20, 1 << 10)
            states.drop()
        streamer.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies by streams: needs a GPU")
def test_on_a_gpu_host_and_device_agree() -> None:
    device = torch.device("cuda")
    streamer = Streamer(device)
    staging, specs = Staging(streamer, slots=3), [((1 << 20,), torch.float32)]
    for placement in PLACEMENTS:
        states = staging.states(placement, 8, specs)
        for row in range(8):
            states.write([row], values([row], specs, device))
        for repetition in range(5):
            for row in range(8):
                with states.read([row]) as (x,):
                    states.prefetch([(row + 1) % 8])
                    torch.cuda._sleep(300_000)
                    states.write([row], [x + 1])
            with states.read([5, 6, 2]) as found:
                check(found, [n + repetition + 1 for n in (5, 6, 2)], specs)
        states.drop()
    streamer.close()
