"""Live bytes of real tensors, seen where operators are dispatched."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Level:
    """Bytes alive now, and the most there were at once."""

    def __init__(self) -> None:
        self.current = self.peak = 0

    def add(self, size: int) -> None:
        """So many bytes more, or fewer."""
        self.current += size
        self.peak = max(self.peak, self.current)


class LiveTensors(TorchDispatchMode):
    """While active, every storage counts from the operator that first shows it until it is freed; views count once.

    Where a GPU would have it: the engine maps its host memory itself, so memory that torch's allocator did not make is
    the host's. What that made belongs to the device, or to the host inside `on_host`. Scratch memory inside an operator
    is not seen.

    Attributes:
        device: what a GPU would hold.
        host: what waits on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device, self.host = Level(), Level()
        self._made = self.device  # what is made now belongs there
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, Level]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in _tensors((args, tuple(kwargs.values()), result)):
            self._hold(tensor)
        return result

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What is made inside belongs to the host."""
        with self._making(self.host):
            yield

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside `on_host`: what is made inside belongs to the device after all."""
        with self._making(self.device):
            yield

    def to_host(self, values: Iterable[Tensor]) -> None:
        """These lie in host memory where there is a GPU; without one a copy to the host is the tensor itself."""
        for tensor in values:
            key = tensor.untyped_storage()._cdata
            reference, size, level = self._live[key]
            if level is self.device:
                level.add(-size)
                self.host.add(size)
                self._live[key] = reference, size, self.host

    @contextmanager
    def _making(self, level: Level) -> Iterator[None]:
        outer, self._made = self._made, level
        try:
            yield
        finally:
            self._made = outer

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size, level = storage.nbytes(), self._made if storage.resizable() else self.host
        self._live[key] = weakref.ref(storage, partial(self._free, key)), size, level
        level.add(size)

    def _free(self, key: int, _: Any) -> None:
        _, size, level = self._live.pop(key)
        level.add(-size)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
