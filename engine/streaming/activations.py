"""Per-sample tensors of a step (block inputs, cotangents): kept on the device, or on the host behind staging slots."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from leapalign.engine.streaming.streamer import Buffer, Streamer

Rows: TypeAlias = slice | Sequence[int]
Spec: TypeAlias = tuple[tuple[int, ...], torch.dtype]  # shape of one row, dtype
Placement: TypeAlias = Literal["device", "host"]

ALIGNMENT = 512  # bytes: the CUDA allocator's own, so that kernels may take their widest loads

STAGING_SLOTS = 8  # 3 are read, 3 prefetched (input, modulation, gradient), 2 leave


class SampleStates:
    """A tuple of (rows, *shape) tensors, one for each spec, written and read by rows. Made by `Staging.states`.

    Rows are a slice or any list of indices, in any order; neighbouring ones travel in one copy. On the host each row
    has its own events, so that a row may come in while another one leaves.

    On the device a read gives views of the states (or gathers rows that do not lie together); on the host it gives
    views of a staging slot. Either way they are valid inside the `with` block only, and rows that are read must not
    be written before the last use of what was read.
    """

    def __init__(self, staging: Staging, placement: Placement, rows: int, specs: Sequence[Spec]) -> None:
        assert placement in ("device", "host"), placement
        self.rows = rows
        self.specs = tuple((tuple(shape), dtype) for shape, dtype in specs)
        self._staging = staging
        self._written: set[int] = set()
        self._staged: dict[tuple[int, ...], _Slot] = {}  # rows whose present values a slot holds, or will hold
        self._home: _Home | None = None
        self._tensors: tuple[Tensor, ...] = ()
        with torch.inference_mode(False):  # what is made during sampling serves training too
            if placement == "host":
                self._home = staging._take_home(rows, self.specs)
                self._tensors = self._home.tensors
                self._give_back = weakref.finalize(self, staging._homes.append, self._home)
            else:
                self._tensors = tuple(
                    torch.empty(rows, *shape, dtype=dtype, device=staging.streamer.device)
                    for shape, dtype in self.specs
                )

    def write(self, rows: Rows, values: Sequence[Tensor]) -> None:
        """Keep `values`, device tensors (len(rows), *shape) for each spec; another floating dtype is cast.

        They are copied before anything that compute is given later, and may be overwritten then.
        """
        index = self._index(rows)
        assert len(set(index)) == len(index), f"rows {index} are written twice at once"
        assert len(values) == len(self.specs), f"{len(values)} tensors for {len(self.specs)} specs"
        for value, (shape, _) in zip(values, self.specs, strict=True):
            assert value.shape == (len(index), *shape), f"{tuple(value.shape)} for rows {index} of {shape}"
        self._written.update(index)
        if not index:
            return
        with torch.no_grad():
            if self._home is None:
                for tensor, value in zip(self._tensors, values, strict=True):
                    for start, stop, at in _runs(index):
                        tensor[start:stop].copy_(value[at : at + stop - start])
                return
            for staged_index in [staged for staged in self._staged if not set(staged).isdisjoint(index)]:
                self._forget(staged_index)  # it holds the values of before
            streamer = self._staging.streamer
            slot = self._staging._take_slot(len(index), self.specs)
            staged = _layout(slot.buffer.tensor, len(index), self.specs)
            with streamer.use(slot.buffer):
                for to, value in zip(staged, values, strict=True):
                    to.copy_(value)
        copies = [(there, here) for here, there in self._pairs(index, staged)]
        streamer.store([self._home.regions[row] for row in index], slot.buffer, copies)
        self._assign(slot, index)

    def prefetch(self, rows: Rows) -> None:
        """Start to bring the rows in, if they are on the host, all written, and not on their way already."""
        index = self._index(rows)
        if self._home is not None and index and self._written.issuperset(index):
            slot = self._staged.get(index) or self._load(index)
            slot.prefetched = True

    @contextmanager
    def read(self, rows: Rows) -> Iterator[tuple[Tensor, ...]]:
        """Device tensors (len(rows), *shape) for each spec, valid inside the block. Blocks may be nested.

        RuntimeError: one of the rows was never written.
        """
        index = self._index(rows)
        if not self._written.issuperset(index):
            raise RuntimeError(f"rows {sorted(set(index) - self._written)} are read, but were never written")
        if self._home is None or not index:
            yield tuple(_gather(tensor, index) for tensor in self._tensors)
            return
        slot = self._staged.get(index)
        if slot is None or slot.buffer.in_use:  # read twice at once
            slot = self._load(index)
        slot.prefetched = False
        with self._staging.streamer.use(slot.buffer):
            yield _layout(slot.buffer.tensor, len(index), self.specs)

    def drop(self) -> None:
        """The values are no longer needed: device memory goes, host memory is kept for the next states. Idempotent."""
        for index in list(self._staged):
            self._forget(index)
        self._written.clear()
        self.rows = 0
        self._tensors = ()
        if self._home is not None:
            self._home = None
            self._give_back()

    def _index(self, rows: Rows) -> tuple[int, ...]:
        index = tuple(range(*rows.indices(self.rows))) if isinstance(rows, slice) else tuple(rows)
        assert all(0 <= row < self.rows for row in index), f"rows {index} of {self.rows}"
        return index

    def _load(self, index: tuple[int, ...]) -> _Slot:
        assert self._home is not None
        slot = self._staging._take_slot(len(index), self.specs)
        staged = _layout(slot.buffer.tensor, len(index), self.specs)
        regions = [self._home.regions[row] for row in dict.fromkeys(index)]
        self._staging.streamer.load(slot.buffer, regions, self._pairs(index, staged))
        self._assign(slot, index)
        return slot

    def _pairs(self, index: tuple[int, ...], staged: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(part of a staging slot, part of the host's tensors) for every run of neighbouring rows."""
        return [
            (here[at : at + stop - start], there[start:stop])
            for here, there in zip(staged, self._tensors, strict=True)
            for start, stop, at in _runs(index)
        ]

    def _assign(self, slot: _Slot, index: tuple[int, ...]) -> None:
        if index in self._staged:  # two readers: the later one's slot is the one that others find
            self._forget(index)
        self._staged[index] = slot
        slot.states, slot.index = weakref.ref(self), index

    def _forget(self, index: tuple[int, ...]) -> None:
        slot = self._staged.pop(index)
        slot.states, slot.prefetched = None, False


class Staging:
    """The staging slots on the device and the host memory behind all `SampleStates` of a model. Made once.

    `slots` slots, made as they are first needed: six are enough for two readers, what is prefetched for each, and two
    writes on their way out. Only if all of them are being read at once there come more. All are as large as the
    largest microbatch yet. Nothing shrinks before the streamer closes; in steady state nothing is allocated.
    """

    def __init__(self, streamer: Streamer, slots: int = 6) -> None:
        assert slots >= 2, slots  # one could not be written while another is on its way
        self.streamer = streamer
        self._most = slots
        self._ring: list[_Slot] = []  # least recently taken first
        self._nbytes = 0  # of a slot
        self._homes: list[_Home] = []  # of states that were dropped

    def states(self, placement: Placement, rows: int, specs: Sequence[Spec]) -> SampleStates:
        """Empty states: for each spec (shape of a row, dtype) a tensor (rows, *shape)."""
        return SampleStates(self, placement, rows, specs)

    def release(self) -> None:
        """Free the staging slots until they are needed again; what is on the host stays there."""
        for slot in self._ring:
            assert not slot.buffer.in_use, "a staged row is being read"
            states = slot.states() if slot.states is not None else None
            if states is not None:
                states._forget(slot.index)
            self.streamer.free(slot.buffer)
        self._ring.clear()

    def _take_slot(self, rows: int, specs: Sequence[Spec]) -> _Slot:
        """The slot that was taken longest ago and is not in use, made large enough; it forgets what it held."""
        self._nbytes = max(self._nbytes, _nbytes(rows, specs))
        free = [slot for slot in self._ring if not slot.buffer.in_use]
        if len(self._ring) < self._most or not free:
            slot = _Slot(self.streamer.slot(self._nbytes))
        else:  # if need be a prefetch is given up; it is loaded again when it is read
            slot = next((slot for slot in free if not slot.wanted), free[0])
            self._ring.remove(slot)
            states = slot.states() if slot.states is not None else None
            if states is not None:
                states._forget(slot.index)
            slot.states, slot.prefetched = None, False
            if slot.buffer.nbytes < self._nbytes:
                self.streamer.free(slot.buffer)
                slot.buffer = self.streamer.slot(self._nbytes)
        self._ring.append(slot)
        return slot

    def _take_home(self, rows: int, specs: tuple[Spec, ...]) -> _Home:
        """Host memory for these states: of dropped ones if theirs is enough, the smallest such, else new."""
        nbytes = _nbytes(rows, specs)
        fitting = [home for home in self._homes if home.buffer.nbytes >= nbytes]
        if fitting:
            home = min(fitting, key=lambda home: (home.buffer.nbytes, not home.is_for(rows, specs)))
            self._homes.remove(home)
            if home.is_for(rows, specs):
                return home  # with the events of its last user: copies under way stay in order
            self.streamer.settle(*home.regions)
            return _Home(home.buffer, self.streamer, rows, specs)
        if self._homes:  # it takes the place of a smaller one: never more of them than were in use at once
            home = min(self._homes, key=lambda home: home.buffer.nbytes)
            self._homes.remove(home)
            self.streamer.settle(*home.regions)
            self.streamer.free(home.buffer)
        return _Home(self.streamer.host(nbytes), self.streamer, rows, specs)


@dataclass(eq=False)
class _Slot:
    """A staging slot, and which rows of which states it holds."""

    buffer: Buffer
    states: weakref.ref[SampleStates] | None = None
    index: tuple[int, ...] = ()
    prefetched: bool = False  # and not yet read

    @property
    def wanted(self) -> bool:
        return self.prefetched and self.states is not None and self.states() is not None


class _Home:
    """The host memory of one `SampleStates`: its tensors, and a region (that is, events) for each row."""

    def __init__(self, buffer: Buffer, streamer: Streamer, rows: int, specs: tuple[Spec, ...]) -> None:
        self.buffer = buffer
        self.specs = specs
        self.tensors = _layout(buffer.tensor, rows, specs)
        self.regions = [streamer.wrap(buffer.tensor) for _ in range(rows)]

    def is_for(self, rows: int, specs: tuple[Spec, ...]) -> bool:
        return len(self.regions) == rows and self.specs == specs


def _layout(memory: Tensor, rows: int, specs: Sequence[Spec]) -> tuple[Tensor, ...]:
    """Views (rows, *shape) of the memory, (bytes,) uint8, one after the other at multiples of 512 bytes."""
    views, offset = [], 0
    for shape, dtype in specs:
        size = rows * prod(shape) * dtype.itemsize
        views.append(memory[offset : offset + size].view(dtype).view(rows, *shape))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return tuple(views)


def _nbytes(rows: int, specs: Sequence[Spec]) -> int:
    sizes = [rows * prod(shape) * dtype.itemsize for shape, dtype in specs]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _runs(index: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, stop, at): rows start..stop-1 lie together, and are found from place `at` of the index on."""
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(index)) if b != a + 1), len(index)]
    return [(index[at], index[at] + end - at, at) for at, end in pairwise(breaks) if end > at]


def _gather(tensor: Tensor, index: tuple[int, ...]) -> Tensor:
    """The rows of a device tensor: a view where they lie together, else a copy."""
    parts = [tensor[start:stop] for start, stop, _ in _runs(index)]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else tensor[:0]
