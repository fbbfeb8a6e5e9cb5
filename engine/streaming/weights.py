"""Weights on the device: resident units, and slots through which the others are streamed from the host store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.engine.memory.store import BlockStore
from leapalign.engine.streaming.streamer import Buffer, Streamer

SCRATCH_BYTES = (
    64 * 2**20
)  # slots are at least this large, or the largest unit if that is less: they carry gradients too


@dataclass
class _Slot:
    """One piece of device memory and what it holds.

    Attributes:
        unit: whose weights were loaded last; None if they were overwritten.
        version: of the host's weights when they were loaded.
        awaited: loaded ahead of their use.
        busy: in use by the running computation.
        age: grows with every load or use.
    """

    buffer: Buffer
    unit: str | None = None
    version: int = -1
    awaited: bool = False
    busy: bool = False
    age: int = 0


class Weights:
    """Gives the weights of one unit at a time to the computation, and loads the next while it runs.

    Device memory: the resident units' bytes, plus `slots` times the largest streamed unit's, allocated here and never
    again, but after `release`. On the CPU a resident unit is the host store itself.

    A unit that is still in its slot, or resident, is not loaded again while the host's weights are unchanged.
    """

    def __init__(
        self,
        store: BlockStore,
        streamer: Streamer,
        *,
        resident: Collection[str],
        slots: int,
        version: Callable[[str], int],
    ) -> None:
        """
        Args:
            resident: units that stay on the device.
            slots: device slots for all the others.
            version: a unit's number that grows whenever its weights on the host change.
        """
        self._store, self._streamer, self._version = store, streamer, version
        self._regions = {name: streamer.wrap(store.region(name)) for name in store.units}
        self._itemsize = store.dtype.itemsize
        on_host = streamer.device.type == "cpu"
        self._resident: dict[str, _Slot] = {}
        for name in resident:
            region = self._regions[name]
            buffer = region if on_host else streamer.slot(self._nbytes(name))
            self._resident[name] = _Slot(buffer, name, version(name) if on_host else -1)
        self._in_place = frozenset(resident) if on_host else frozenset()
        streamed = [self._nbytes(name) for name in store.units if name not in self._resident]
        largest = max((self._nbytes(name) for name in store.units), default=0)
        self.slot_bytes = max([min(SCRATCH_BYTES, largest), *streamed])
        self._slots = [_Slot(streamer.slot(self.slot_bytes)) for _ in range(slots)]
        self._clock = 0

    def prefetch(self, unit: str) -> None:
        """Start loading a unit, if it is not there and a slot is free for it."""
        slot = self._resident.get(unit) or self._find(unit) or self._idle()
        if slot is not None:
            self._ensure(slot, unit)
            slot.awaited = True

    @contextmanager
    def use(self, unit: str) -> Iterator[dict[str, Tensor]]:
        """The unit's weights, {full parameter name: device tensor}, valid inside the block."""
        slot = self._resident.get(unit) or self._find(unit) or self._idle(evict=True)
        assert slot is not None, "every slot is in use: a unit was not given back"
        self._ensure(slot, unit)
        slot.busy, slot.awaited = True, False
        try:
            if unit in self._in_place:
                yield self._store.views(unit)
            else:
                with self._streamer.use(slot.buffer):
                    yield self._store.units[unit].views(self._flat(slot, self._store.units[unit].numel))
        finally:
            slot.busy = False

    @contextmanager
    def scratch(self, dtype: torch.dtype) -> Iterator[tuple[Buffer, Tensor]]:
        """A free slot, and all of it as a flat tensor; for gradients on their way to or from the host.

        Not touched by the computation yet: call the streamer's `begin`, `end`, `load` and `store` on the buffer.
        """
        slot = self._idle(evict=True)
        assert slot is not None, "every slot is in use: a unit was not given back"
        self._clock += 1
        self._restore(slot, self.slot_bytes)
        slot.unit, slot.awaited, slot.busy, slot.age = None, False, True, self._clock  # the next piece takes another
        try:
            yield slot.buffer, slot.buffer.tensor[: self.slot_bytes // dtype.itemsize * dtype.itemsize].view(dtype)
        finally:
            slot.busy = False

    def release(self) -> None:
        """Free all device memory, of resident units and slots; the next use of each allocates and loads it again."""
        for unit, slot in [*self._resident.items(), *((None, slot) for slot in self._slots)]:
            if unit not in self._in_place and slot.buffer.nbytes:
                assert not slot.busy, f"{slot.unit} is in use"
                self._streamer.free(slot.buffer)
                slot.unit, slot.version, slot.awaited = unit, -1, False

    def region(self, unit: str) -> Buffer:
        """The unit's weights on the host, with the events of the copies from and to them."""
        return self._regions[unit]

    def settle(self) -> None:
        """Wait until no load reads the host's weights any more: from then on they may be changed."""
        for region in self._regions.values():
            if region.loaded is not None:
                self._streamer.settle(region)

    def _ensure(self, slot: _Slot, unit: str) -> None:
        """Load the unit into this slot, unless it is there already."""
        self._clock += 1
        slot.age = self._clock
        version = self._version(unit)
        if unit in self._in_place or (slot.unit == unit and slot.version == version):
            return
        self._restore(slot, self._nbytes(unit) if unit in self._resident else self.slot_bytes)
        target = self._flat(slot, self._store.units[unit].numel)
        self._streamer.load(slot.buffer, self._regions[unit], [(target, self._store.region(unit))])
        slot.unit, slot.version = unit, version

    def _restore(self, slot: _Slot, nbytes: int) -> None:
        """Device memory for a slot that was released."""
        if slot.buffer.nbytes == 0 and nbytes:
            slot.buffer = self._streamer.slot(nbytes)

    def _find(self, unit: str) -> _Slot | None:
        return next((slot for slot in self._slots if slot.unit == unit), None)

    def _idle(self, *, evict: bool = False) -> _Slot | None:
        """The slot unused for longest; with `evict` one that was loaded ahead if there is no other."""
        free = [slot for slot in self._slots if not slot.busy and (evict or not slot.awaited)]
        return min(free, key=lambda slot: (slot.awaited, slot.age), default=None)

    def _flat(self, slot: _Slot, numel: int) -> Tensor:
        if slot.buffer.tensor.dtype == self._store.dtype:
            return slot.buffer.tensor[:numel]
        return slot.buffer.tensor[: numel * self._itemsize].view(self._store.dtype)

    def _nbytes(self, unit: str) -> int:
        return self._store.units[unit].numel * self._itemsize
