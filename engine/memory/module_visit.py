"""Frozen models that wait in host memory and visit the device for one phase, as a reward and its VAE do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from leapalign.engine.memory.arena import HostArena

ALIGNMENT = 512  # bytes: the CUDA allocator's own
_GUEST = "_guest"  # attribute of a module that has visited


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the module's parameters and buffers are on `device`, outside in host memory.

    Its tensors stay the same objects; what is changed on the device is lost. The first visit moves them into one
    allocation, page-locked if the device is a GPU, and every visit copies that at once. Blocks may be nested. A module
    that has a place of its own already stays there, and where the device is the CPU nothing happens.
    """
    guest = module.__dict__.get(_GUEST)
    if guest is None:
        tensors = chain(module.parameters(), module.buffers())
        if device.type == "cpu" or any(tensor.device.type != "cpu" for tensor in tensors):
            yield
            return
        guest = module.__dict__[_GUEST] = Guest(module, pin=device.type == "cuda")
    with guest.on(device):
        yield


class Guest:
    """The tensors of a module, and their memory on the host."""

    def __init__(self, module: nn.Module, *, pin: bool) -> None:
        self._tensors = list(dict.fromkeys(chain(module.parameters(), module.buffers())))
        self._starts: list[int] = []
        self._visits = total = 0
        for tensor in self._tensors:
            self._starts.append(total)
            total += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._arena = HostArena({"weights": total}, pin=False)  # kept: its end unlocks the pages
        self._memory = self._arena["weights"]
        for tensor, home in zip(self._tensors, self._views(self._memory), strict=True):
            tensor.data = home.copy_(tensor)  # frees what it had: there is no second copy of the model
        if pin:
            self._arena.lock()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Bring the tensors to the device for the block."""
        self._visits += 1
        try:
            if self._visits == 1:
                here = self._memory.to(device, non_blocking=True, copy=True)
                for tensor, view in zip(self._tensors, self._views(here), strict=True):
                    tensor.data = view
                del here
            yield
        finally:
            self._visits -= 1
            if self._visits == 0:
                for tensor, home in zip(self._tensors, self._views(self._memory), strict=True):
                    tensor.data = home

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(self._tensors, self._starts, strict=True)
        ]
