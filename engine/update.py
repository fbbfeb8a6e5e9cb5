"""One unit's AdamW update on the host or on the device: which bytes go where. kernels/adamw8bit.py does the sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from leapalign.engine.modulation import OuterProduct
from leapalign.engine.store import ALIGNMENT
from leapalign.engine.streamer import Buffer
from leapalign.kernels.adamw8bit import Hyper, update
from leapalign.kernels.host import sum_of_squares
from leapalign.kernels.quantize import BLOCK

if TYPE_CHECKING:
    from leapalign.engine.streamed import StreamedModel

Gradient = Tensor | OuterProduct

RUN = 2**22  # elements at once where a gradient is made of factors (16 MiB in float32), and at most in a slot
# kind in the store -> (argument of kernels.adamw8bit.update, elements of the unit for one of the kind)
KINDS = {
    "m": ("codes_m", 1),
    "m_absmax": ("absmax_m", BLOCK),
    "v": ("codes_v", 1),
    "v_absmax": ("absmax_v", BLOCK),
    "residual": ("residual", 1),
    "master": ("master", 1),
    "ema": ("ema", 1),
}


@dataclass(frozen=True)
class Group:
    """Settings of a parameter group at this step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Updater:
    """Updates units of a model's store, in place.

    On the host it works on the store itself. On the device it brings weights and states of a piece of the unit into a
    scratch slot, updates them there beside the gradient, and sends them back. Both give the same bits where they do the
    same arithmetic: rounding is keyed by (seed, step, parameter, element).
    """

    def __init__(
        self,
        model: StreamedModel,
        *,
        placement: Literal["host", "device"],
        master: Literal["stochastic", "residual", "float32"],
        ema: bool,
    ) -> None:
        self._model, self._store, self._placement = model, model.store, placement
        low = self._store.dtype != torch.float32
        dtypes = {"m": torch.uint8, "m_absmax": torch.float32, "v": torch.uint8, "v_absmax": torch.float32}
        if low and master == "residual":
            dtypes["residual"] = torch.int8
        if low and master == "float32":
            dtypes["master"] = torch.float32
        if ema:
            dtypes["ema"] = self._store.dtype
        self._dtypes = dtypes
        for kind, dtype in dtypes.items():
            self._store.allocate(kind, dtype, per=KINDS[kind][1])
        self._numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
        self._buffers: dict[tuple[str, str], Buffer] = {}
        for kind in dtypes.keys() & {"master", "ema"}:  # they begin at the weights
            for unit in self._store.units:
                self._store.region(unit, kind).copy_(self._store.region(unit))

    def states(self, name: str) -> dict[str, Tensor | int]:
        """{"step": 0, kind: the store's memory of a parameter's state, flat}, for the optimizer's `state`."""
        unit = next(unit for unit in self._store.units.values() if name in unit.shapes)
        start, count = unit.offsets[name], unit.shapes[name].numel()
        found: dict[str, Tensor | int] = {"step": 0}
        for kind in self._dtypes:
            per = KINDS[kind][1]
            found[kind] = self._store.region(unit.name, kind)[start // per : -(-(start + count) // per)]
        return found

    def update(
        self, unit: str, gradients: Mapping[str, Gradient], groups: Mapping[str, Group], *, step: int, scale: float,
        seed: int, ema_decay: float | None,
    ) -> None:  # fmt: skip
        """One AdamW step of the unit's parameters that have a gradient.

        Args:
            gradients: {full name: gradient}, on the device or on the host.
            scale: factor on all gradients, from clipping.
        """
        if self._placement == "host":
            self._model.streamer.settle(self._model.weights.region(unit))
        layout = self._store.units[unit]
        for name, gradient in gradients.items():
            group, start = groups[name], layout.offsets[name]
            hyper = Hyper(group.lr, group.beta1, group.beta2, group.eps, group.weight_decay, step)
            count = layout.shapes[name].numel()
            step_size = self._run(gradient)
            for first in range(0, count, step_size):
                stop = min(first + step_size, count)
                found = elements(gradient, first, stop)
                with self._memory(unit, start + first, start + stop) as memory:
                    update(
                        memory.pop("weights"),
                        found.to(self._device),
                        hp=hyper,
                        seed=seed,
                        parameter=self._numbers[name],
                        first=first,
                        scale=scale,
                        ema_decay=ema_decay or 0.0,
                        **{KINDS[state][0]: values for state, values in memory.items()},
                    )
        self._model.weights_changed(unit)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self._placement == "host" else self._model.device

    def _run(self, gradient: Gradient) -> int:
        """Elements at once, a multiple of 256."""
        if self._placement == "host":
            return RUN if isinstance(gradient, OuterProduct) else 2**62
        fits = (self._model.weights.slot_bytes - ALIGNMENT * (len(self._dtypes) + 1)) * BLOCK // self._block_bytes
        assert fits >= BLOCK, "a slot holds no block of weights and states"
        return min(fits // BLOCK * BLOCK, RUN)

    @property
    def _block_bytes(self) -> int:
        """Bytes of weights and states of 256 elements."""
        states = sum(BLOCK // KINDS[kind][1] * dtype.itemsize for kind, dtype in self._dtypes.items())
        return BLOCK * self._store.dtype.itemsize + states

    @contextmanager
    def _memory(self, unit: str, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        """{"weights" or a kind: elements start ... stop of the unit}, to be changed in place."""
        on_host = {"weights": self._store.region(unit)[start:stop]}
        for kind in self._dtypes:
            per = KINDS[kind][1]
            on_host[kind] = self._store.region(unit, kind)[start // per : -(-stop // per)]
        if self._placement == "host":
            yield on_host
            return
        with self._model.weights.scratch(torch.uint8) as (slot, memory):
            on_device, offset = {}, 0
            for kind, values in on_host.items():
                on_device[kind] = memory[offset : offset + values.nbytes].view(values.dtype)
                offset += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
            regions = [self._model.weights.region(unit), *(self._buffer(unit, kind) for kind in self._dtypes)]
            pairs = [(on_device[kind], on_host[kind]) for kind in on_host]
            streamer = self._model.streamer
            streamer.load(slot, regions, pairs)
            with streamer.use(slot):
                yield on_device
            streamer.store(regions, slot, [(there, here) for here, there in pairs])

    def _buffer(self, unit: str, kind: str) -> Buffer:
        """The events of one kind's region."""
        if (unit, kind) not in self._buffers:
            self._buffers[unit, kind] = self._model.streamer.wrap(self._store.region(unit, kind))
        return self._buffers[unit, kind]


def elements(gradient: Gradient, start: int, stop: int) -> Tensor:
    """Elements start ... stop of a gradient, flat; those of factors are multiplied out, in float32."""
    if not isinstance(gradient, OuterProduct):
        return gradient.reshape(-1)[start:stop]
    columns = gradient.shape[1]
    first, last = start // columns, -(-stop // columns)
    rows = gradient.left[:, first:last].float().T @ gradient.right.float()
    return rows.reshape(-1)[start - first * columns : stop - first * columns]


def square_sum(gradient: Gradient) -> float:
    """The sum of squares of a gradient, in float64; inf or nan if an element is."""
    if isinstance(gradient, OuterProduct):
        return float(gradient.square_sum())
    if gradient.device.type == "cpu" and gradient.is_contiguous():
        return sum_of_squares(gradient)
    return float(gradient.double().square().sum())
