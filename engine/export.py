"""A streamed model's weights and average as diffusers folders, without a second copy of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from leapalign.engine.passes.protocols import Streamed

SWAPPED = 2**22  # elements at once where two kinds change places: 8 MiB of bfloat16 beside them


def save_model(model: Streamed, folder: Path, *, kind: str = "weights") -> None:
    """Write a diffusers model folder of the weights or of their average ("ema"), from where they are.

    The wrapped module's own `save_pretrained` hands a whole file's tensors, 10 GB, to safetensors at once.

    Args:
        model: wraps a diffusers model.
        folder: is made if it is not there.
    """
    model.streamer.drain()
    folder.mkdir(parents=True, exist_ok=True)
    module: Any = model.module  # a diffusers model
    module.save_config(folder)
    model.store.save(folder, kind=kind, buffers=saved_buffers(model))


def saved_buffers(model: Streamed) -> dict[str, Tensor]:
    """{full name: buffer} of what the model's files hold beside its parameters (SD3's position embedding)."""
    parameters = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.module.state_dict().items() if name not in parameters}


@contextmanager
def swapped(model: Streamed, kind: str) -> Iterator[None]:
    """Inside the block the weights have the values of another kind of their dtype ("ema"), and it has theirs.

    They change places piece by piece and back again, so every bit is restored.
    """
    _swap(model, kind)
    try:
        yield
    finally:
        _swap(model, kind)


def _swap(model: Streamed, kind: str) -> None:
    model.streamer.drain()
    for unit in model.store.units:
        weights, other = model.store.region(unit), model.store.region(unit, kind)
        assert weights.dtype == other.dtype, f"{kind} is {other.dtype}, the weights are {weights.dtype}"
        for start in range(0, weights.numel(), SWAPPED):
            part = slice(start, start + SWAPPED)
            passing = weights[part].clone()
            weights[part].copy_(other[part])
            other[part].copy_(passing)
        model.weights_changed(unit)
