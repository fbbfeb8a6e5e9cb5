"""Weight gradients: one buffer of one unit on the device, held sums on the host, and their delivery."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.memory.store import BlockStore
from leapalign.engine.streaming.streamer import Buffer, Streamer
from leapalign.engine.streaming.weights import Weights


class Sink(Protocol):
    """Takes finished gradients, one unit a call, each trainable parameter once a pass.

    Attributes:
        on_host: whether it wants them in host memory. They are then copied out while the next unit computes.
    """

    on_host: bool

    def __call__(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct], /) -> None:
        """
        Args:
            unit: the unit's name in the store.
            gradients: {full parameter name: gradient}, float32, or float64 for float64 weights; valid only during the
                call, or as long as work is handed over with `Gradients.delivered`. A hoisted modulation linear's weight
                comes as factors.
        """
        ...


class GradientDictionary:
    """A sink that keeps every gradient whole, on the host: 4 bytes a parameter (8 for float64)."""

    on_host = True

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def __call__(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct]) -> None:
        for name, gradient in gradients.items():
            if not isinstance(gradient, OuterProduct):
                self.grads[name] = gradient.clone()
                continue
            whole = self.grads[name] = gradient.left.new_empty(gradient.shape, dtype=accumulation(gradient.left.dtype))
            for rows, tile in gradient.tiles(2**22, dtype=whole.dtype):
                whole[rows] = tile


class Gradients:
    """The sum of one unit's weight gradients over legs and microbatches, and where it goes when it is finished.

    Device memory: one buffer of the largest unit, float32 (float64 for float64 weights). Sums are carried from pass to
    pass in the store, in the weights' dtype, under a kind's name ("held", "grad").
    """

    def __init__(self, store: BlockStore, streamer: Streamer, weights: Weights, numel: int) -> None:
        """
        Args:
            numel: elements of the largest unit that will ever be differentiated.
        """
        self._store, self._streamer, self._weights = store, streamer, weights
        self.dtype = accumulation(store.dtype)
        self._numel = numel
        self._buffer: Buffer | None = None  # made at the first backward pass: sampling needs none
        self._host: Buffer | None = None  # made at the first delivery to a sink on the host
        self._regions: dict[tuple[str, str], Buffer] = {}
        self._pending: Callable[[], None] | None = None
        self.filled: dict[str, set[str]] = {}  # kind -> units whose region holds a sum

    @contextmanager
    def sum(self, unit: str, *, carry: str) -> Iterator[dict[str, Tensor]]:
        """{full parameter name: tensor to add to}, beginning with the sum carried under this kind, or with zero.

        To be followed by `carry` or `deliver` for the same unit.
        """
        buffer, flat = self._flat(unit)
        with self._streamer.use(buffer):
            if unit in self.filled.get(carry, ()):
                for part, region, values in self._chunks(unit, carry):
                    with self._weights.scratch(self._store.dtype) as (slot, held):
                        self._streamer.load(slot, region, [(held[: values.numel()], values)])
                        with self._streamer.use(slot):
                            flat[part].copy_(held[: values.numel()])
            else:
                flat.zero_()
            yield self._store.units[unit].views(flat)

    def carry(self, unit: str, kind: str) -> None:
        """Keep the sum on the host, in the weights' dtype."""
        self._store.allocate(kind, self._store.dtype)
        buffer, flat = self._flat(unit)
        for part, region, values in self._chunks(unit, kind):
            with self._weights.scratch(self._store.dtype) as (slot, rounded):
                with self._streamer.use(slot, buffer):
                    rounded[: values.numel()].copy_(flat[part])
                self._streamer.store(region, slot, [(values, rounded[: values.numel()])])
        self.filled.setdefault(kind, set()).add(unit)

    def deliver(self, unit: str, names: Collection[str], sink: Sink) -> None:
        """Hand the finished sum of these parameters to the sink, at the latest in `flush`."""
        buffer, flat = self._flat(unit)
        self.filled.get("held", set()).discard(unit)
        layout = self._store.units[unit]
        if not sink.on_host:
            with self._streamer.use(buffer):
                views = layout.views(flat)
                sink(unit, {name: views[name] for name in names})
            return
        self.flush()  # the host buffer's last contents
        if self._host is None:
            self._host = self._streamer.host(self._numel * self.dtype.itemsize)
        host = self._host
        target = host.tensor[: flat.numel() * self.dtype.itemsize].view(self.dtype)
        self._streamer.store(host, buffer, [(target, flat)])

        def call_sink() -> None:
            self._streamer.settle(host)
            views = layout.views(target)
            sink(unit, {name: views[name] for name in names})

        self._pending = call_sink  # when the next unit has been launched: the sink works while that one computes

    @property
    def delivered(self) -> Sequence[Buffer]:
        """What holds the gradients of a sink on the host: work that is handed over with it finds them unchanged."""
        return [] if self._host is None else [self._host]

    def flush(self) -> None:
        """Hand over what is still on its way to a sink on the host."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending()

    def cancel(self) -> None:
        """Forget what an interrupted pass left on its way."""
        self._pending = None

    def release(self) -> None:
        """Free the device's buffer until the next backward pass."""
        assert self._pending is None, "a gradient is still on its way"
        if self._buffer is not None:
            self._streamer.free(self._buffer)
            self._buffer = None

    def settle(self, kind: str) -> None:
        """Wait until the carried sums of this kind are in host memory."""
        for (_, of), region in self._regions.items():
            if of == kind and (region.stored is not None or region.loaded is not None):
                self._streamer.settle(region)

    def _chunks(self, unit: str, kind: str) -> Iterator[tuple[slice, Buffer, Tensor]]:
        """(part of the unit's flat elements, host region, the region's part) in pieces that fit a slot."""
        region = self._store.region(unit, kind)
        buffer = self._regions.get((unit, kind))
        if buffer is None:
            buffer = self._regions[unit, kind] = self._streamer.wrap(region)
        step = self._weights.slot_bytes // self._store.dtype.itemsize
        for start in range(0, region.numel(), step):
            part = slice(start, min(start + step, region.numel()))
            yield part, buffer, region[part]

    def _flat(self, unit: str) -> tuple[Buffer, Tensor]:
        """The buffer, and the unit's flat elements in it."""
        if self._buffer is None:
            self._buffer = self._streamer.slot(self._numel * self.dtype.itemsize)
        return self._buffer, self._buffer.tensor[: self._store.units[unit].numel * self.dtype.itemsize].view(self.dtype)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: bfloat16 would lose the sum over legs and microbatches."""
    return torch.promote_types(dtype, torch.float32)
