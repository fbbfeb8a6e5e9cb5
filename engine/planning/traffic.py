"""What a step moves and computes, stage by stage, and the seconds of it: copies run beside arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from leapalign.engine.memory.store import Unit
from leapalign.engine.passes.hoisting import ROWS
from leapalign.engine.planning.planned_step import PlannedStep
from leapalign.engine.planning.stage_costs import Part, state_bytes
from leapalign.engine.planning.workload import Machine, RewardLoad

HOST_UPDATE = 14  # bytes that an update on the host reads and writes, a parameter: gradient, weights, moments
PLAIN_UPDATE = 28  # the same of float32 AdamW


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes and operations of one visit to a stage."""

    flops: float = 0
    h2d: float = 0
    d2h: float = 0
    host: float = 0
    calls: float = 0

    def seconds(self, machine: Machine) -> float:
        """Of the slowest: launching and copying, both ways at once, run beside arithmetic."""
        return max(
            self.flops / machine.flops_per_s,
            self.calls * machine.seconds_per_call,
            self.h2d / machine.h2d_bytes_per_s,
            self.d2h / machine.d2h_bytes_per_s,
            self.host / machine.host_bytes_per_s,
        )


@dataclass(slots=True)
class Total:
    """Of many visits, one after the other."""

    flops: float = 0.0
    h2d: float = 0.0
    d2h: float = 0.0
    seconds: float = 0.0

    def add(self, traffic: Traffic, machine: Machine, times: float = 1) -> None:
        self.flops += times * traffic.flops
        self.h2d += times * traffic.h2d
        self.d2h += times * traffic.d2h
        self.seconds += times * traffic.seconds(machine)

    def join(self, other: Total, times: float) -> None:
        """Add another total so many times."""
        self.flops += times * other.flops
        self.h2d += times * other.h2d
        self.d2h += times * other.d2h
        self.seconds += times * other.seconds


@dataclass(frozen=True, slots=True)
class Reward:
    """A way to run the reward: which load, and how many pictures at once."""

    load: RewardLoad
    rows: int

    @property
    def device_bytes(self) -> int:
        """Of its models and of what they compute."""
        return self.load.weight_bytes + self.rows * self.load.activation_bytes


class Movements:
    """The totals of each phase, for one batch."""

    def __init__(self, setting: PlannedStep, machine: Machine) -> None:
        self._of, self._machine = setting, machine

    def hoist(self) -> Total:
        of = self._of
        return of.once("hoist's traffic", (of.plan.keeps_ends, of.device_states), self._hoist)

    def _hoist(self) -> Total:
        total, of, costs = Total(), self._of, self._of.costs
        rows, unit = of.hoisted_rows, costs.condition_unit
        loads = 0 if unit is None or unit.name in of.resident else unit.numel * of.item
        total.add(Traffic(costs.condition(1).flops * rows, loads, calls=-(-rows // ROWS)), self._machine)
        for part, count in of.modulated():
            assert part.modulation is not None
            out = 0 if of.device_states else rows * part.given * of.item
            flops = 2 * rows * part.given * costs.width
            visit = Traffic(flops, part.modulation.numel * of.item, out, calls=-(-rows // ROWS))
            total.add(visit, self._machine, count)
        return total

    def rollout(self) -> Total:
        of, total = self._of, Total()
        for part, resident, count in self._groups:
            total.join(self._forward(part, resident, 1), count * of.workload.num_inference_steps)
        if of.plan.keep_block_inputs and not of.device_states:  # beside the arithmetic of all steps: no time
            total.d2h += of.workload.legs * of.once("record's traffic", (of.plan.every,), self._record)
        return total

    def _record(self) -> int:
        return sum(state_bytes(part.carried, self._of.batch) for part in self._of.kept_positions)

    def backward(self, legs: int, params: bool, *, deliver: bool) -> Total:
        """See `Footprint.backward`."""
        total, of, head = Total(), self._of, self._of.costs.parts[-1]
        again = self._again(legs, params)
        missing = (len(of.blocks) - (len(of.kept_positions) - 1)) / len(of.blocks) if of.plan.every > 1 else 0
        for part, resident, count in self._groups:
            if again and part is not head:
                total.join(self._forward(part, resident, again), count)
            if missing and part.carried and part is not head:
                total.join(self._forward(part, resident, legs), count * missing)
            total.join(self._product(part, resident, legs, params, deliver), count)
        if params:
            decisions = (legs, deliver, of.updates_on_device, of.mode_holds)
            total.join(of.once("modulation's traffic", decisions, lambda: self._modulation(legs, deliver)), 1)
        return total

    def _again(self, legs: int, params: bool) -> int:
        """Evaluations whose block inputs nobody kept."""
        of = self._of
        if of.plan.keep_block_inputs and of.workload.num_inference_steps:
            return 0
        if params and of.plan.mode == "paired":
            return legs - of.workload.first_passes  # the others' records are there
        return legs

    def _modulation(self, legs: int, deliver: bool) -> Total:
        """Gradients of the hoisted linears and of the embedders before them."""
        total, of, costs = Total(), self._of, self._of.costs
        rows = legs * of.batch
        for part, count in of.modulated():
            assert part.modulation is not None
            update = self._unit(part.modulation, deliver, factors=True)
            flops = 2 * rows * part.given * costs.width
            loads = part.modulation.numel * of.item + update.h2d
            total.add(Traffic(flops, loads, update.d2h, update.host, calls=1), self._machine, count)
        if costs.condition_unit is not None:
            update = self._unit(costs.condition_unit, deliver)
            flops = costs.condition_backward(1).flops * rows
            total.add(Traffic(flops, update.h2d, update.d2h, update.host, calls=2), self._machine)
        return total

    def update(self) -> Total:
        of = self._of
        return of.once("update's traffic", (of.updates_on_device,), self._update)

    def _update(self) -> Total:
        total, of = Total(), self._of
        for unit in of.costs.units.values():
            if of.updates_on_device:
                moved = self._moved(unit)
                total.add(Traffic(h2d=unit.numel * of.item + moved, d2h=moved), self._machine)
            else:
                total.add(Traffic(host=(HOST_UPDATE if of.updates else PLAIN_UPDATE) * unit.numel), self._machine)
        return total

    def reward(self, reward: Reward, residency: str, resident_bytes: int) -> Total:
        """Weights that left the device for it come back."""
        total, of, load = Total(), self._of, reward.load
        reload = resident_bytes if residency == "off" else 0
        total.add(Traffic(h2d=reload + load.weight_bytes), self._machine)
        launches = -(-of.batch // reward.rows) * load.blocks * (3 if of.workload.legs else 1)
        total.add(Traffic(flops=load.flops * of.batch, calls=launches), self._machine)
        return total

    # ---- visits ----------------------------------------------------------------------------------------------------

    @cached_property
    def _groups(self) -> list[tuple[Part, bool, int]]:
        """(part, whether its weights are resident, how many such)."""
        return self._of.once("groups", (self._of.plan.keeps_ends, self._of.kept), lambda: list(self._grouped()))

    def _grouped(self) -> Iterator[tuple[Part, bool, int]]:
        of = self._of
        yield of.costs.parts[0], of.plan.keeps_ends, 1
        flags = [(part.kind, index < of.kept) for index, part in enumerate(of.blocks)]
        start = 0
        for (_, resident), members in groupby(flags):
            count = len(list(members))
            yield of.blocks[start], resident, count
            start += count
        yield of.costs.parts[-1], of.plan.keeps_ends, 1

    def _forward(self, part: Part, resident: bool, evaluations: int) -> Total:
        of = self._of
        decisions = (part.kind, resident, evaluations, of.rows, of.device_states)
        return of.once("forward visit", decisions, lambda: self._forward_visit(part, resident, evaluations))

    def _forward_visit(self, part: Part, resident: bool, evaluations: int) -> Total:
        of = self._of
        rows, travels = evaluations * of.batch, evaluations > 1 or of.rows < of.batch
        loads = self._weights(part, resident) + (self._states(part, rows) if travels else 0)
        loads += 0 if of.device_states else rows * part.given * of.item
        out = self._states(part, rows, leaving=True) if travels and part is not of.costs.parts[-1] else 0
        return self._one(Traffic(of.costs.forward(part, 1).flops * rows, loads, out, calls=self._calls(evaluations)))

    def _product(self, part: Part, resident: bool, legs: int, params: bool, deliver: bool) -> Total:
        of = self._of
        own = (of.rows, of.device_states, of.updates_on_device, of.mode_holds)
        decisions = (part.kind, resident, legs, params, deliver, *own)
        return of.once("product", decisions, lambda: self._product_visit(part, resident, legs, params, deliver))

    def _product_visit(self, part: Part, resident: bool, legs: int, params: bool, deliver: bool) -> Total:
        of, rows = self._of, legs * self._of.batch
        arriving = self._states(part, rows, leaving=True) if part is not of.costs.parts[-1] else 0
        loads = self._weights(part, resident) + self._states(part, rows) + arriving
        loads += 0 if of.device_states else rows * part.given * of.item
        update = self._unit(part.unit, deliver) if params else Traffic()
        flops = of.costs.backward(part, 1, params=params).flops * rows
        out = self._states(part, rows) + update.d2h
        return self._one(Traffic(flops, loads + update.h2d, out, update.host, 3 * self._calls(legs)))

    def _one(self, visit: Traffic) -> Total:
        return Total(visit.flops, visit.h2d, visit.d2h, visit.seconds(self._machine))

    def _weights(self, part: Part, resident: bool) -> int:
        return 0 if resident else part.unit.numel * self._of.item

    def _states(self, part: Part, rows: int, *, leaving: bool = False) -> int:
        if self._of.device_states:
            return 0
        return state_bytes(part.leaving if leaving else part.carried, 1) * rows

    def _calls(self, evaluations: int) -> int:
        return -(-self._of.batch // self._of.rows) * evaluations

    def _unit(self, unit: Unit, deliver: bool, *, factors: bool = False) -> Traffic:
        """Of a unit's finished gradient, and of its update if that is part of the pass."""
        of, held = self._of, unit.numel * self._of.item
        if not deliver:
            return Traffic(d2h=0 if factors else held)
        carried = held if of.mode_holds and not factors else 0
        if of.updates_on_device:
            return Traffic(h2d=carried + self._moved(unit), d2h=self._moved(unit))
        out = 0 if factors else unit.numel * of.sum_item
        return Traffic(h2d=carried, d2h=out, host=HOST_UPDATE * unit.numel if of.updates else 0)

    def _moved(self, unit: Unit) -> int:
        """Weights and states of a unit, one way."""
        return unit.numel * self._of.item + self._of.state_bytes(unit)
