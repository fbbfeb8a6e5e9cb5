"""A workload under the decisions of a plan, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property
from typing import Any, TypeVar

from leapalign.engine.memory.arena import PAGE
from leapalign.engine.memory.store import Unit
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.stage_costs import Part, StageCosts
from leapalign.engine.planning.workload import Workload
from leapalign.engine.streaming.gradients import accumulation

T = TypeVar("T")
Known = dict[Hashable, Any]


class PlannedStep:
    """What bytes (footprint.py) and seconds (traffic.py) of a step are computed from.

    Attributes:
        batch, rows: samples that go through the model together, and those that one block evaluates at once.
        item, sum_item: bytes of a weight, and of an element of its gradient.
        blocks, kept: the model's blocks, and how many of them, from the first on, are resident.
        device_states: per-sample tensors wait on the device between the blocks.
        updates: weights are updated by AdamW8bit; `updates_on_device`: there.
        mode_holds: the first leg's weight gradients wait on the host for those of the last one.
        legs: of the last product; 0 for sampling.
        delivers: the last product updates the weights.
    """

    def __init__(self, costs: StageCosts, plan: MemoryPlan, workload: Workload, known: Known) -> None:
        """
        Args:
            known: of the same costs and workload: what other plans have computed already.
        """
        self.costs, self.plan, self.workload, self._known = costs, plan, workload, known
        self.batch = workload.batch
        self.rows = min(plan.microbatch or self.batch, self.batch)
        self.item = costs.dtype.itemsize
        self.sum_item = accumulation(costs.dtype).itemsize
        self.blocks = costs.parts[1:-1]
        self.kept = plan.resident_blocks(len(self.blocks))
        self.device_states = plan.block_inputs == "device"
        self.updates = workload.legs > 0 and workload.optimizer == "adamw8bit"
        self.updates_on_device = self.updates and plan.optimizer_on == "device"
        self.mode_holds = plan.mode == "held" and workload.first_passes > 0
        self.legs = 1 if self.mode_holds else workload.legs
        self.delivers = not workload.holds

    def once(self, what: str, decisions: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """What `make` returns, computed once for all plans with these decisions."""
        key = (what, decisions)
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    @cached_property
    def resident(self) -> frozenset[str]:
        """Units that stay on the device."""
        return self.once("resident", (self.plan.keeps_ends, self.kept), self._resident)

    def _resident(self) -> frozenset[str]:
        if not self.plan.keeps_ends:
            return frozenset()
        parts = [self.costs.parts[0], *self.blocks[: self.kept], self.costs.parts[-1]]
        ends = [self.costs.condition_unit] if self.costs.condition_unit else []
        return frozenset(unit.name for unit in [*ends, *(part.unit for part in parts)])

    @property
    def largest(self) -> int:
        """Parameters of the largest unit."""
        return self.once("largest", (), lambda: max(unit.numel for unit in self.costs.units.values()))

    @property
    def hoisted_rows(self) -> int:
        """(sample, noise level) pairs whose modulation is known at once."""
        if not self.costs.hoisted:
            return 0
        return self.batch * (self.workload.num_inference_steps or self.workload.legs)

    def modulated(self) -> Iterator[tuple[Part, int]]:
        """(one of each kind of hoisted linears' stages, how many)."""
        return ((part, self.costs.counts[part.kind]) for part in self.costs.kinds if part.modulation)

    @property
    def kept_positions(self) -> list[Part]:
        """Blocks and the head, where their input is kept for the backward pass."""
        last, every = len(self.blocks), self.plan.every
        return [part for p, part in enumerate(self.costs.parts[1:]) if p % every == 0 or p == last]

    @property
    def record_legs(self) -> int:
        """Legs whose block inputs are kept at once."""
        return 1 if self.mode_holds and not self.plan.keep_block_inputs else self.workload.legs

    def state_bytes(self, unit: Unit) -> int:
        """Of the optimizer's states and the average on the host, or of the gradients."""
        return self.once("states of a unit", (unit.name,), lambda: self._state_bytes(unit.numel))

    def _state_bytes(self, numel: int) -> int:
        workload = self.workload
        if not workload.legs:
            return 0
        if workload.optimizer == "gradients":
            return numel * self.sum_item
        if workload.optimizer == "adamw":
            gradients = 2 if workload.gradient_accumulation_steps > 1 else 1  # the sum, and the next pass's
            return numel * ((2 + gradients) * self.sum_item + (4 if workload.ema else 0))
        found = 2 * page(numel) + 2 * page(numel // 256 * 4)
        if self.item < 4:
            found += {"stochastic": 0, "residual": page(numel), "float32": page(4 * numel)}[workload.master]
        return found + (page(numel * self.item) if workload.ema else 0)


def page(count: int) -> int:
    """Bytes of host memory that so many take: whole pages."""
    return -(-count // PAGE) * PAGE
