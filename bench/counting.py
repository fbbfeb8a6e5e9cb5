"""Counts what a GPU would hold and compute while code runs on fake tensors: live device bytes and FLOPs, by phase.

Nothing is allocated and nothing computed on fake tensors, yet every operator is dispatched, so that a step of a 12B
model can be run on a laptop (bench/devices.py).

Not counted, because no operator shows it, and so to be added on a real card: the CUDA context, workspaces inside cuBLAS
and flash attention, fragmentation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bench.devices import Call, is_on_gpu, tensors

ALLOCATION = 512  # the CUDA caching allocator rounds every block up to a multiple of this many bytes


@dataclass(frozen=True)
class Holding:
    """Storages of one kind that are alive at a peak: the operator that made them, shape and dtype, how many, bytes."""

    operator: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    counted_bytes: int


@dataclass
class Phase:
    """What one phase took: the most bytes alive during it, also those that were there before, and its FLOPs."""

    counted_bytes: int = 0
    flops: int = 0


class DeviceCounter:
    """Observes a simulated GPU: live bytes, their peak, and FLOPs of every operator.

    A storage counts from the operator that first shows it (result or argument) until it is freed, rounded up to 512
    bytes; views count once. FLOPs are those of torch's own registry (matrix products, convolutions, attention;
    elementwise work is not in it).

    Attributes:
        current, peak: bytes alive now, and the most there were at once.
        flops: floating-point operations so far.
        phases: by name, in the order of their first entry.
    """

    def __init__(self) -> None:
        self.current = self.peak = self.flops = 0
        self.phases: dict[str, Phase] = {}
        self._flops: dict[Any, int] = {}  # by call
        self._watermark = 0  # most bytes since the innermost phase began
        self._live: dict[int, tuple[int, Any, torch.Size, torch.dtype]] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._at_peak: list[tuple[int, Any, torch.Size, torch.dtype]] = []
        self._fresh_peak = False  # the peak has not been left yet, nor listed

    def observe(self, call: Call, given: list[Tensor], result: Any) -> None:
        """Count an operator: its FLOPs, and the storages that it shows for the first time."""
        self.hold(given, call.operator)
        self.hold([tensor for tensor in tensors(result) if is_on_gpu(tensor)], call.operator)
        flops = self._flops.get(call.key)
        if flops is None:
            count = flop_registry.get(call.operator.overloadpacket)
            flops = 0 if count is None else count(*call.args, **call.kwargs, out_val=result)
            self._flops[call.key] = flops
        self.flops += flops

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what runs inside; all phases of one name are one entry. An outer phase includes its inner ones."""
        phase = self.phases.setdefault(name, Phase())
        outer, flops = self._watermark, self.flops
        self._watermark = self.current
        try:
            yield
        finally:
            phase.counted_bytes = max(phase.counted_bytes, self._watermark)
            phase.flops += self.flops - flops
            self._watermark = max(outer, self._watermark)

    def hold(self, values: Iterable[Tensor], operator: Any) -> None:
        """Count the storages of tensors on the GPU that are new; `operator` is said to have made them."""
        for tensor in values:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live:
                continue
            size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            self._live[key] = (size, operator, tensor.shape, tensor.dtype)
            self._references[key] = weakref.ref(storage, partial(self._free, key))
            self._grow(size)

    def holdings(self) -> list[Holding]:
        """What was alive at the peak, largest first."""
        if self._fresh_peak:
            self._list_holdings()
        kinds = Counter(self._at_peak)
        rows = [
            Holding(str(operator), tuple(shape), str(dtype).removeprefix("torch."), count, count * size)
            for (size, operator, shape, dtype), count in kinds.items()
        ]
        return sorted(rows, key=lambda row: -row.counted_bytes)

    def _grow(self, size: int) -> None:
        self.current += size
        self._watermark = max(self._watermark, self.current)
        if self.current > self.peak:
            self.peak, self._fresh_peak = self.current, True

    def _free(self, key: int, _: Any) -> None:
        if self._fresh_peak and self.current == self.peak:  # just before the peak is left: once a local maximum
            self._list_holdings()
        self.current -= self._live.pop(key)[0]
        del self._references[key]

    def _list_holdings(self) -> None:
        self._at_peak, self._fresh_peak = list(self._live.values()), False
