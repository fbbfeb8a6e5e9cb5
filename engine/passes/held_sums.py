"""Weight gradients that wait on the host: sums carried from product to product, and what ends them."""

from __future__ import annotations

import torch
from torch import Tensor

from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.passes.forward import Parts
from leapalign.engine.passes.hoisting import held_linears
from leapalign.engine.streaming.gradients import Sink
from leapalign.engine.streaming.partition import modulation_unit, stages_of


class HeldSums:
    """The sums of a model, by kind: "held" of `StreamedModel.vjp`, "grad" of the parameters' `grad`.

    A sum is in the weights' dtype in the store. Held gradients of hoisted modulation linears are factors.

    Attributes:
        factors: {unit: [(left (R, width), right (R, D)) on the host]} of hoisted linears, kind "held".
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._store = parts, parts.store
        self.factors: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def units(self, kind: str) -> set[str]:
        """The units that have a sum of this kind in the store; the set that the engine itself reads and changes."""
        return self._parts.gradients.filled.setdefault(kind, set())

    def take(self, kind: str) -> dict[str, dict[str, Tensor | OuterProduct]]:
        """{unit: {full parameter name: gradient}} of the sums of a kind, on the host; they count as spent.

        The tensors are views of the store, in the weights' dtype, valid until the next product.
        """
        self._parts.gradients.settle(kind)
        found: dict[str, dict[str, Tensor | OuterProduct]] = {}
        for unit in self._parts.gradients.filled.pop(kind, set()):
            views = self._store.views(unit, kind)
            found[unit] = {name: views[name] for name in self._parts.trainable(unit)}
        if kind == "held":
            found |= held_linears(self._parts, self.factors, self._parts.trainable)
            self.factors.clear()
        return {unit: found[unit] for unit in self._store.units if unit in found}

    def fill(self) -> None:
        """Hold zero for every trainable unit that has no sum yet: the gradient where no sample is active."""
        self._store.allocate("held", self._store.dtype)
        self._parts.gradients.settle("held")
        filled = self.units("held")
        for unit, zero in self._zero_factors().items():
            self.factors.setdefault(unit, zero)
        for unit in self._store.units:
            if self._parts.trainable(unit) and unit not in filled and unit not in self.factors:
                self._store.region(unit, "held").zero_()
                filled.add(unit)

    @torch.no_grad()
    def deliver(self, sink: Sink) -> None:
        """What `vjp` with "deliver" does, for no leg at all: every unit's held sum, or zero, goes to the sink."""
        parts = self._parts
        target = torch.device("cpu") if sink.on_host else parts.device
        factors = {
            unit: [(left.to(target), right.to(target)) for left, right in held]
            for unit, held in {**self._zero_factors(), **self.factors}.items()
        }
        linears = held_linears(parts, factors, parts.trainable)
        try:
            for unit in self._store.units:
                if unit in linears:
                    sink(unit, linears[unit])
                elif names := parts.trainable(unit):
                    with parts.gradients.sum(unit, carry="held"):
                        pass
                    parts.gradients.deliver(unit, names, sink)
            parts.gradients.flush()
            parts.weights.settle()
        finally:
            parts.gradients.cancel()
        self.factors.clear()

    def discard(self) -> None:
        """Forget held gradients that were accumulated and never delivered."""
        self._parts.gradients.filled.pop("held", None)
        self.factors.clear()

    def _zero_factors(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """{unit: factors without rows} of all trainable hoisted linears."""
        found, dtype = {}, self._store.dtype
        for stage in stages_of(self._parts.backbone):
            if stage.modulation and self._parts.trainable(unit := modulation_unit(stage)):
                shapes = [self._store.units[unit].shapes[f"{linear}.weight"] for linear in stage.modulation]
                left = torch.zeros(0, sum(shape[0] for shape in shapes), dtype=dtype)
                found[unit] = [(left, torch.zeros(0, shapes[0][1], dtype=dtype))]
        return found
