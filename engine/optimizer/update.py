"""One unit's AdamW update on the host or on the device: which bytes go where. kernels/adamw8bit has the sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.memory.store import ALIGNMENT
from leapalign.engine.passes.protocols import Streamed
from leapalign.engine.streaming.streamer import Buffer
from leapalign.kernels.adamw8bit import host as host_adamw8bit
from leapalign.kernels.adamw8bit.definition import Hyper, update
from leapalign.kernels.adamw8bit.device import expand, update_outer, update_triton
from leapalign.kernels.adamw8bit.quantize import BLOCK
from leapalign.kernels.dispatch import reaches_device
from leapalign.kernels.host.pool import Handle
from leapalign.kernels.sum_of_squares import sum_of_squares, sum_of_squares_torch

Gradient = Tensor | OuterProduct

Kernels = Literal["auto", "triton", "torch"]

RUN = 2**22  # elements at once on the device, at most
TILE = 2**20  # elements that factors are multiplied out to, in torch: two of 4 MiB in float32 while they are
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

    On the host it works on the store itself, in the threads of `kernels.host`, which go on while the caller launches
    the next unit; whoever touches the weights next waits. On the device it brings weights and states of a piece of the
    unit into a scratch slot, updates them there beside the gradient, and sends them back; with Triton a piece is one
    launch, and a gradient of factors is never multiplied out. The same gradients give the same bits everywhere: every
    operation is rounded once, sums have one order, and the draws of rounding are keyed by (seed, step, parameter,
    element).
    """

    def __init__(
        self,
        model: Streamed,
        *,
        placement: Literal["host", "device"],
        master: Literal["stochastic", "residual", "float32"],
        ema: bool,
        kernels: Kernels,
    ) -> None:
        self._model, self._store, self._placement = model, model.store, placement
        self._device = torch.device("cpu") if placement == "host" else model.device
        self._handed_over: list[Handle] = []
        wanted = kernels == "triton" or (kernels == "auto" and reaches_device(model.device))
        self._triton = placement == "device" and wanted
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
            gradients: {full name: gradient}, on the device or on the host, all finite. On the host they are read until
                `finish`: copies, the model's sums, or what its `Gradients` deliver.
            scale: factor on all gradients, from clipping.
        """
        options = {
            name: {
                "hp": Hyper(group.lr, group.beta1, group.beta2, group.eps, group.weight_decay, step),
                "seed": seed,
                "parameter": self._numbers[name],
                "scale": scale,
                "ema_decay": ema_decay or 0.0,
            }
            for name, group in ((name, groups[name]) for name in gradients)
        }
        if self._placement == "host":

            def work() -> Iterator[Handle]:
                for name in gradients:
                    handle = self._start(unit, name, gradients[name], options[name])
                    self._handed_over.append(handle)
                    yield handle

            buffers = self._model.weights.region(unit), *self._model.gradients.delivered
            self._model.streamer.hand_over(work, *buffers)
        else:
            for name, gradient in gradients.items():
                start = self._store.units[unit].offsets[name]
                if isinstance(gradient, OuterProduct):
                    gradient = OuterProduct(gradient.left.to(self._device), gradient.right.to(self._device))
                for first, stop in self._pieces(gradient):
                    self._update(gradient, first, stop, self._memory(unit, start + first, start + stop), options[name])
        self._model.weights_changed(unit)

    def finish(self) -> None:
        """Wait until weights and states are in host memory, for whoever reads them there."""
        if self._placement == "device":
            self._model.streamer.drain()
        handed_over, self._handed_over = self._handed_over, []
        for handle in handed_over:
            handle.wait()

    def _start(self, unit: str, name: str, gradient: Gradient, options: dict[str, Any]) -> Handle:
        """Hand the update of a parameter over to the host kernels."""
        start, count = self._store.units[unit].offsets[name], gradient.shape.numel()
        given: Tensor | tuple[Tensor, Tensor]
        if isinstance(gradient, OuterProduct):  # a few rows, whose memory is the caller's when this returns
            left, right = (factor.to("cpu", copy=True).contiguous() for factor in (gradient.left, gradient.right))
            given = left, right
        else:
            given = gradient.reshape(-1)
        return host_adamw8bit.update(gradient=given, **self._on_host(unit, start, start + count), **options, guard=0.0)

    def _update(
        self,
        gradient: Gradient,
        first: int,
        stop: int,
        memory: AbstractContextManager[dict[str, Any]],
        options: dict[str, Any],
    ) -> None:
        """Elements first ... stop of a parameter."""
        if self._triton and isinstance(gradient, OuterProduct):
            columns = gradient.shape[1]
            if first % columns == 0 == stop % columns:
                left, right = gradient.left[:, first // columns : stop // columns], gradient.right
                with memory as tensors:
                    weights = tensors.pop("weights").view(-1, columns)
                    update_outer(weights, left.contiguous(), right.contiguous(), **tensors, **options, first=first)
                return
        piece = elements(gradient, first, stop).to(self._device)
        with memory as tensors:
            (update_triton if self._triton else update)(gradient=piece, **tensors, **options, first=first)

    def square_sum(self, gradients: Iterable[Gradient]) -> float:
        """The sum of squares of all of them, in float64; inf or nan if an element is. Waits for the device once.

        The same bits for host and device: `sum_of_squares` has one order, the sum over parameters is rounded once, and
        factors, a few numbers, are multiplied on the host wherever they are.
        """
        sums, products = [], []
        for gradient in gradients:
            if isinstance(gradient, OuterProduct):
                products.append(float(OuterProduct(gradient.left.cpu(), gradient.right.cpu()).square_sum()))
            else:
                here = self._triton and gradient.device == self._device
                sums.append((sum_of_squares if here else sum_of_squares_torch)(gradient.contiguous()))
        return math.fsum([*(torch.stack(sums).tolist() if sums else []), *products])

    def _pieces(self, gradient: Gradient) -> Iterator[tuple[int, int]]:
        """(first element, the one behind the last) of what is updated at once: whole blocks of 256, but at the end.

        Of factors they are whole rows too, for the kernel that does not multiply them out, where that fits.
        """
        fits = (self._model.weights.slot_bytes - ALIGNMENT * (len(self._dtypes) + 1)) * BLOCK // self._block_bytes
        assert fits >= BLOCK, "a slot holds no block of weights and states"
        count, limit = gradient.shape.numel(), min(fits // BLOCK * BLOCK, RUN)
        if isinstance(gradient, OuterProduct):
            rows = math.lcm(gradient.shape[1], BLOCK)  # elements of the fewest that are whole blocks
            limit = (limit // rows * rows or limit) if self._triton else min(limit, TILE)
        for first in range(0, count, limit):
            yield first, min(first + limit, count)

    @property
    def _block_bytes(self) -> int:
        """Bytes of weights and states of 256 elements."""
        states = sum(BLOCK // KINDS[kind][1] * dtype.itemsize for kind, dtype in self._dtypes.items())
        return BLOCK * self._store.dtype.itemsize + states

    def _on_host(self, unit: str, start: int, stop: int) -> dict[str, Any]:
        """{argument of `update`: elements start ... stop of the unit in the store}."""
        found = {"weights": self._store.region(unit)[start:stop]}
        for kind in self._dtypes:
            argument, per = KINDS[kind]
            found[argument] = self._store.region(unit, kind)[start // per : -(-stop // per)]
        return found

    @contextmanager
    def _memory(self, unit: str, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """{argument of `update`: elements start ... stop of the unit, on the device}, sent back when the block ends."""
        on_host = self._on_host(unit, start, stop)
        with self._model.weights.scratch(torch.uint8) as (slot, memory):
            on_device, offset = {}, 0
            for name, values in on_host.items():
                on_device[name] = memory[offset : offset + values.nbytes].view(values.dtype)
                offset += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
            regions = [self._model.weights.region(unit), *(self._buffer(unit, kind) for kind in self._dtypes)]
            pairs = [(on_device[name], on_host[name]) for name in on_host]
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
    """Elements start ... stop of a gradient, flat; those of factors are multiplied out in float32, by `expand`."""
    if not isinstance(gradient, OuterProduct):
        return gradient.reshape(-1)[start:stop]
    columns = gradient.shape[1]
    first, last = start // columns, -(-stop // columns)
    rows = expand(gradient.left[:, first:last], gradient.right)
    return rows.view(-1)[start - first * columns : stop - first * columns]
