"""What a step takes under a plan: bytes at the peak of each phase, bytes copied, FLOPs and seconds.

Activations are counted a block at a time (engine/stage_costs.py). Everything else is arithmetic over the units, and
mirrors what weights.py, gradients.py, activations.py, passes.py, backward.py and hoisting.py allocate.

All per-sample tensors of a step (latents, prompt embeddings, gradients between the phases) are taken to be on the host.
What is allocated on first use and then kept (staging slots, the gradient buffer) counts in every phase, as it does from
the second step on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Literal

from leapalign.engine.arena import PAGE
from leapalign.engine.gradients import accumulation
from leapalign.engine.hoisting import ROWS
from leapalign.engine.plan import MemoryPlan, PhaseCost
from leapalign.engine.stage_costs import Part, Specs, StageCosts, rounded, state_bytes
from leapalign.engine.store import Unit
from leapalign.engine.streamed import STAGING_SLOTS
from leapalign.engine.weights import SCRATCH_BYTES
from leapalign.engine.workload import Machine, RewardLoad, Workload

HOST_BASE = 2**30  # Python, torch and the CUDA context's share of host memory
UPDATE_BYTES = 96 * 2**20  # temporaries of an update on the device: 2^20 elements in pieces, and a tile of factors
HOST_UPDATE = 14  # bytes that an update on the host reads and writes, a parameter: gradient, weights, moments


@dataclass(frozen=True)
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


class _Total:
    """Traffic of a phase, and its seconds stage by stage."""

    def __init__(self, machine: Machine) -> None:
        self.flops = self.h2d = self.d2h = self.seconds = 0.0
        self._machine = machine

    def add(self, traffic: Traffic, times: float = 1) -> None:
        self.flops += times * traffic.flops
        self.h2d += times * traffic.h2d
        self.d2h += times * traffic.d2h
        self.seconds += times * traffic.seconds(self._machine)


def predict(costs: StageCosts, plan: MemoryPlan, workload: Workload, machine: Machine | None = None) -> MemoryPlan:
    """The plan with its predictions.

    Args:
        costs: of the same model; hoisted as the plan says, with the workload's resolution and dtype.
    """
    prediction = _Prediction(costs, plan, workload, machine or Machine())
    loads = workload.rewards
    load = next((load for load in loads if load.checkpointed == plan.checkpoint_reward), loads[0] if loads else None)
    return prediction.plan(load, plan.reward_residency)


def variants(costs: StageCosts, plan: MemoryPlan, workload: Workload, machine: Machine) -> Iterator[MemoryPlan]:
    """The plan with its predictions, for every way of running the workload's reward."""
    prediction = _Prediction(costs, plan, workload, machine)
    if not workload.rewards:
        yield prediction.plan(None, plan.reward_residency)
    residencies: tuple[Literal["on", "off"], ...] = ("on", "off")
    for load in workload.rewards:
        for residency in residencies:
            yield prediction.plan(load, residency)


class _Prediction:
    def __init__(self, costs: StageCosts, plan: MemoryPlan, workload: Workload, machine: Machine) -> None:
        self.costs, self._plan, self.workload, self.machine = costs, plan, workload, machine
        self.batch = workload.batch
        self.rows = min(plan.microbatch or self.batch, self.batch)
        self.item = costs.dtype.itemsize
        self.sum_item = accumulation(costs.dtype).itemsize
        self.device_states = plan.block_inputs == "device"
        self.blocks = costs.parts[1:-1]
        self.kept = plan.resident_blocks(len(self.blocks))
        self.adam = workload.optimizer == "adamw8bit"
        self.updates_on_device = self.adam and plan.optimizer_on == "device"
        self.mode_holds = plan.mode == "held" and workload.first_passes > 0

    def plan(self, load: RewardLoad | None, residency: Literal["on", "off"]) -> MemoryPlan:
        """The plan with this reward."""
        phases = self.phases
        if load is None:
            return replace(self._plan, phases=phases)
        place = sum(phase.name in ("hoist", "rollout") for phase in phases)
        phases = (*phases[:place], self._reward(load, residency), *phases[place:])
        return replace(self._plan, reward_residency=residency, checkpoint_reward=load.checkpointed, phases=phases)

    @cached_property
    def phases(self) -> tuple[PhaseCost, ...]:
        """All of the transformer's."""
        return tuple(self._phases())

    def _phases(self) -> Iterator[PhaseCost]:
        workload, plan = self.workload, self._plan
        if self.costs.hoisted:
            yield self._phase("hoist", self._hoist_device(), self._hoist_traffic())
        if workload.num_inference_steps:
            yield self._phase("rollout", self._forward_device(), self._rollout_traffic())
        for _ in range(workload.first_passes):
            params = plan.mode == "held"
            name = "first leg" if params else "input gradient"
            device = self._backward_device(1, params, deliver=False)
            yield self._phase(name, device, self._backward_traffic(1, params, deliver=False))
        legs = 1 if self.mode_holds else workload.legs
        deliver = not workload.holds
        device = self._backward_device(legs, True, deliver=deliver)
        yield self._phase("weight gradients", device, self._backward_traffic(legs, True, deliver=deliver))
        if workload.holds or workload.optimizer == "adamw":
            yield self._phase("update", self._update_device(), self._update_traffic())

    # ---- the device ------------------------------------------------------------------------------------------------

    @cached_property
    def weights_device(self) -> dict[str, int]:
        """What is allocated when the model is made."""
        key = ("weights", self._plan.keeps_ends, self.kept, self._plan.slots)
        return self.costs.once(key, self._weights_device)

    def _weights_device(self) -> dict[str, int]:
        resident = self._resident
        streamed = [unit.numel * self.item for name, unit in self.costs.units.items() if name not in resident]
        slot = max([min(SCRATCH_BYTES, self._largest * self.item), *streamed])
        return {
            "resident weights": sum(rounded(self.costs.units[name].numel * self.item) for name in resident),
            "weight slots": self._plan.slots * rounded(slot),
            "buffers": self.costs.buffer_bytes,
        }

    @cached_property
    def _resident(self) -> frozenset[str]:
        if not self._plan.keeps_ends:
            return frozenset()
        parts = [self.costs.parts[0], *self.blocks[: self.kept], self.costs.parts[-1]]
        ends = [self.costs.condition_unit] if self.costs.condition_unit else []
        return frozenset(unit.name for unit in [*ends, *(part.unit for part in parts)])

    @cached_property
    def _largest(self) -> int:
        return self.costs.once("largest unit", lambda: max(unit.numel for unit in self.costs.units.values()))

    @cached_property
    def fixed(self) -> dict[str, int]:
        """What the device holds in all phases but the reward's."""
        found = {"base": self.machine.device_base_bytes, **self.weights_device}
        found["gradient buffer"] = rounded(self._largest * self.sum_item)
        found["staging"] = 0 if self.device_states else STAGING_SLOTS * rounded(self._staging_slot)
        found["activated embeddings"] = rounded(self._hoisted_rows * self.costs.width * self.item)
        if self.device_states:
            found["modulation vectors"] = self._modulation_bytes
            found["kept block inputs"] = self._record_device
        return found

    @cached_property
    def _staging_slot(self) -> int:
        """The largest that travels at once."""
        sizes = [0]
        if self.costs.hoisted:
            rows = max(min(ROWS, self._hoisted_rows), self.batch)  # into the states; a leg's gradients back at once
            sizes.append(max(rows * part.given * self.item for part in self.costs.kinds))
        sizes += [state_bytes(part.carried, self.rows) for part in self.costs.kinds]
        return max(sizes)

    @cached_property
    def _hoisted_rows(self) -> int:
        """(sample, noise level) pairs whose modulation is known at once."""
        if not self.costs.hoisted:
            return 0
        workload = self.workload
        return self.batch * (workload.num_inference_steps or workload.legs)

    @cached_property
    def _modulation_bytes(self) -> int:
        rows = self._hoisted_rows
        return sum(count * rounded(rows * part.given * self.item) for part, count in self._modulated())

    @cached_property
    def _kept_positions(self) -> list[Part]:
        """Blocks and the head, where their input is kept."""
        last, every = len(self.blocks), self._plan.every
        return [part for p, part in enumerate(self.costs.parts[1:]) if p % every == 0 or p == last]

    def _record(self, size: Callable[[Specs, int], int]) -> int:
        """Bytes of one leg's kept block inputs."""
        parts, key = self._kept_positions, ("record", size.__name__, self._plan.every, self.batch)
        return self.costs.once(key, lambda: sum(size(part.carried, self.batch) for part in parts))

    @cached_property
    def _record_legs(self) -> int:
        """Legs whose block inputs are kept at once."""
        return 1 if self.mode_holds and not self._plan.keep_block_inputs else self.workload.legs

    @cached_property
    def _record_device(self) -> int:
        return self._record_legs * self._record(state_bytes)

    @cached_property
    def _widest(self) -> Part:
        return self.costs.once("widest", lambda: max(self.costs.kinds, key=lambda part: state_bytes(part.carried, 1)))

    def _hoist_device(self) -> dict[str, int]:
        rows = min(ROWS, self._hoisted_rows)
        vectors = max(part.given for part in self.costs.kinds) * rows * self.item
        extra = max(2 * rounded(vectors), self.costs.condition(rows).device_bytes)
        return self.fixed | {
            "parts of the embeddings": self.fixed["activated embeddings"],
            "activations": extra,
            "kept block inputs": 0,
        }

    def _forward_device(self) -> dict[str, int]:
        """A pass without grad over the batch."""
        on_device = self.device_states or self.rows >= self.batch
        peak, states = 0, 0
        outputs = 0
        for part in self.costs.kinds:
            call = self.costs.forward(part, self.rows)
            carried = 0
            if on_device:
                carried = state_bytes(part.carried, self.batch)
                carried += state_bytes(part.leaving, self.batch) if part is not self.costs.parts[-1] else 0
            if part is self.costs.parts[-1]:
                outputs = 2 * state_bytes(part.leaving, self.batch)
            before = state_bytes(part.carried, self.rows)  # the last call's result lives until the next one is there
            found = max(call.device_bytes + before, call.kept_bytes + outputs) + carried
            if found > peak:
                peak, states = found, carried
        return self.fixed | {
            "constants": self._constants(1),
            "states": states,
            "activations": peak - states,
        }

    def _backward_device(self, legs: int, params: bool, *, deliver: bool) -> dict[str, int]:
        costs, plan, on_device = self.costs, self._plan, self.device_states
        small = legs * -(-self.batch // self.rows) == 1  # a single microbatch: its states stay on the device
        rows = legs * self.batch
        peak, states = 0, 0
        recomputed = 0
        if on_device or small:
            recomputed = (min(plan.every, len(self.blocks)) - 1) * state_bytes(self._widest.carried, 1) * rows
        for part in costs.kinds:
            call = costs.backward(part, self.rows, params=params)
            carried = recomputed
            if on_device or small:
                leaving = part.leaving if part is not costs.parts[-1] else ()
                carried += legs * (state_bytes(leaving, self.batch) + state_bytes(part.carried, self.batch))
            if call.device_bytes + carried > peak:
                peak, states = call.device_bytes + carried, carried
        gradients = 0
        if params and not costs.hoisted:
            gradients = legs * rounded(self.batch * costs.width * self.sum_item)
        if params and costs.hoisted:
            gradients = rounded(legs * self.batch * costs.width * self.sum_item)
            if on_device:
                each = [n * rounded(self.batch * part.given * self.item) for part, n in self._modulated()]
                gradients += legs * sum(each)
            wide = max(part.given for part in costs.kinds) * self.item
            linears = 2 * rounded(rows * wide) + 3 * rounded(rows * costs.width * self.sum_item)
            embedders = costs.condition_backward(min(ROWS, self.batch)).device_bytes
            peak = max(peak, linears, embedders)
        if params and deliver and self.updates_on_device:
            peak = max(peak, self._update_temporaries)
        return self.fixed | {
            "constants": self._constants(legs),
            "modulation gradients": gradients,
            "states": min(states, peak),
            "activations": peak - min(states, peak),
        }

    def _constants(self, evaluations: int) -> int:
        call = self.costs.constants()
        return (evaluations - 1) * call.kept_bytes + call.device_bytes if evaluations > 1 else call.kept_bytes

    @cached_property
    def _update_temporaries(self) -> int:
        """The double precision squares of the largest gradient, or the update itself."""
        return max(2 * 8 * self.costs.largest_parameter, UPDATE_BYTES)

    def _update_device(self) -> dict[str, int]:
        found = dict(self.fixed)
        found |= {"activated embeddings": 0, "modulation vectors": 0, "kept block inputs": 0}
        return found | {"activations": self._update_temporaries if self.updates_on_device else 0}

    # ---- the host --------------------------------------------------------------------------------------------------

    @cached_property
    def host(self) -> dict[str, int]:
        """What the host holds; it is much the same in all phases, as memory of the step is kept for the next one."""
        workload, units = self.workload, self.costs.units.values()
        key = ("host units", workload.optimizer, workload.master, workload.ema)
        weights, states = self.costs.once(
            key, lambda: (sum(_page(u.numel * self.item) for u in units), sum(self._state_bytes(u) for u in units))
        )
        found = {
            "weights": weights,
            "optimizer": states,
            "held gradients": 0,
            "gradient on its way": 0 if self.updates_on_device else _page(self._largest * self.sum_item),
            "kept block inputs": 0 if self.device_states else self._record_legs * self._record(_pages),
            "states": self._host_states,
            "modulation vectors": 0 if self.device_states else self._modulation_bytes,
            "latents and prompts": self._sample_bytes,
            "buffers": self.costs.buffer_bytes,
            "reward": max((reward.weight_bytes for reward in workload.rewards), default=0),
            "base": HOST_BASE,
        }
        if self.mode_holds or workload.holds:
            found["held gradients"] = found["weights"]
        return {what: count for what, count in found.items() if count}

    def _state_bytes(self, unit: Unit) -> int:
        """Of the optimizer's states and the average, or of the gradients."""
        numel, workload = unit.numel, self.workload
        low = self.item < 4
        if workload.optimizer == "gradients":
            return numel * self.sum_item
        if workload.optimizer == "adamw":
            return numel * (3 * self.sum_item + (4 if workload.ema else 0))
        found = 2 * _page(numel) + 2 * _page(numel // 256 * 4)
        if low:
            found += {"stochastic": 0, "residual": _page(numel), "float32": _page(4 * numel)}[workload.master]
        return found + (_page(numel * self.item) if workload.ema else 0)

    @cached_property
    def _host_states(self) -> int:
        """The pool of states between two blocks: of the rollout, or gradients and recomputed inputs of all legs."""
        if self.device_states:
            return 0
        legs = 1 if self.mode_holds else self.workload.legs
        several = max(2, 2 * legs + (min(self._plan.every, len(self.blocks)) - 1) * legs)
        single = self.rows >= self.batch and legs == 1
        return 0 if single else several * _pages(self._widest.carried, self.batch)

    @cached_property
    def _sample_bytes(self) -> int:
        """Latents of all steps, velocities, gradients and the prompts' embeddings."""
        return self.costs.once(("samples", self.batch), self._count_samples)

    def _count_samples(self) -> int:
        shapes = self.costs.input_specs
        inputs = sum(self.batch * prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        latents = prod(shapes["hidden_states"][0]) * 4 if "hidden_states" in shapes else 0
        return inputs + self.batch * latents * (self.workload.num_inference_steps + 3 * self.workload.legs + 2)

    # ---- traffic ---------------------------------------------------------------------------------------------------

    def _groups(self) -> Iterator[tuple[Part, bool, int]]:
        """(part, whether its weights are resident, how many such)."""
        parts = self.costs.parts
        yield parts[0], self._plan.keeps_ends, 1
        flags = [(part.kind, index < self.kept) for index, part in enumerate(self.blocks)]
        start = 0
        for (_, resident), members in groupby(flags):
            count = len(list(members))
            yield self.blocks[start], resident, count
            start += count
        yield parts[-1], self._plan.keeps_ends, 1

    def _weights(self, part: Part, resident: bool) -> int:
        return 0 if resident else part.unit.numel * self.item

    def _states(self, part: Part, rows: int, *, leaving: bool = False, single: bool = False) -> int:
        if self.device_states or single:
            return 0
        return state_bytes(part.leaving if leaving else part.carried, 1) * rows

    def _hoist_traffic(self) -> _Total:
        total = _Total(self.machine)
        costs, rows = self.costs, self._hoisted_rows
        one = costs.condition(1)
        unit = costs.condition_unit
        loads = 0 if unit is None or unit.name in self._resident else unit.numel * self.item
        total.add(Traffic(one.flops * rows, loads, calls=-(-rows // ROWS)))
        for part, count in self._modulated():
            assert part.modulation is not None
            out = 0 if self.device_states else rows * part.given * self.item
            flops = 2 * rows * part.given * costs.width
            total.add(Traffic(flops, part.modulation.numel * self.item, out, calls=-(-rows // ROWS)), count)
        return total

    def _modulated(self) -> Iterator[tuple[Part, int]]:
        """(one of each kind of hoisted linears' stages, how many)."""
        return ((part, self.costs.counts[part.kind]) for part in self.costs.kinds if part.modulation)

    def _calls(self, per_sample: int) -> float:
        return -(-self.batch // self.rows) * per_sample

    def _forward_visit(self, part: Part, resident: bool, evaluations: int) -> Traffic:
        rows = evaluations * self.batch
        single = evaluations == 1 and self.rows >= self.batch
        flops = self.costs.forward(part, 1).flops * rows
        loads = self._weights(part, resident) + self._states(part, rows, single=single)
        loads += 0 if self.device_states else rows * part.given * self.item
        out = self._states(part, rows, leaving=True, single=single) if part is not self.costs.parts[-1] else 0
        return Traffic(flops, loads, out, calls=self._calls(evaluations))

    def _rollout_traffic(self) -> _Total:
        total = _Total(self.machine)
        for part, resident, count in self._groups():
            total.add(self._forward_visit(part, resident, 1), count * self.workload.num_inference_steps)
        if self._plan.keep_block_inputs and not self.device_states:  # beside the arithmetic of all steps: no time
            total.d2h += self.workload.legs * self._record(state_bytes)
        return total

    def _backward_traffic(self, legs: int, params: bool, *, deliver: bool) -> _Total:
        total, costs, plan = _Total(self.machine), self.costs, self._plan
        again = not plan.keep_block_inputs or not self.workload.num_inference_steps
        if again and params and plan.mode == "paired" and self.workload.first_passes:
            again_legs = legs - self.workload.first_passes  # the others' records are there
        else:
            again_legs = legs if again else 0
        rows = legs * self.batch
        for part, resident, count in self._groups():
            if again_legs and part is not costs.parts[-1]:
                total.add(self._forward_visit(part, resident, again_legs), count)
            call = costs.backward(part, 1, params=params)
            if part.carried and plan.every > 1 and part is not costs.parts[-1]:
                recomputed = len(self.blocks) - (len(self._kept_positions) - 1)
                total.add(self._forward_visit(part, resident, legs), count * recomputed / len(self.blocks))
            flops = call.flops * rows
            arriving = self._states(part, rows, leaving=True) if part is not costs.parts[-1] else 0
            loads: float = self._weights(part, resident) + self._states(part, rows) + arriving
            loads += 0 if self.device_states else rows * part.given * self.item
            out = self._states(part, rows)
            update = self._unit_traffic(part.unit, params, deliver)
            visit = Traffic(flops, loads + update.h2d, out + update.d2h, update.host, 3 * self._calls(legs))
            total.add(visit, count)
        if params:
            for part, count in self._modulated():
                assert part.modulation is not None
                update = self._unit_traffic(part.modulation, params, deliver, factors=True)
                flops = 2 * rows * part.given * costs.width
                loads = part.modulation.numel * self.item + update.h2d
                total.add(Traffic(flops, loads, update.d2h, update.host, calls=1), count)
            if costs.condition_unit is not None:
                call = costs.condition_backward(1)
                update = self._unit_traffic(costs.condition_unit, params, deliver)
                total.add(Traffic(call.flops * rows, update.h2d, update.d2h, update.host, calls=2))
        return total

    def _unit_traffic(self, unit: Unit, params: bool, deliver: bool, *, factors: bool = False) -> Traffic:
        """Of a unit's finished gradient, and of its update if that is part of the pass."""
        if not params:
            return Traffic()
        held = unit.numel * self.item
        if not deliver:
            return Traffic(d2h=0 if factors else held)
        carried = held if self.mode_holds and not factors else 0
        if self.updates_on_device:
            return Traffic(h2d=carried + self._update_bytes(unit), d2h=self._update_bytes(unit))
        out = 0 if factors else unit.numel * self.sum_item
        return Traffic(h2d=carried, d2h=out, host=HOST_UPDATE * unit.numel if self.adam else 0)

    def _update_bytes(self, unit: Unit) -> int:
        """Weights and states of a unit, one way."""
        return unit.numel * self.item + self._state_bytes(unit)

    def _update_traffic(self) -> _Total:
        total = _Total(self.machine)
        for unit in self.costs.units.values():
            if self.updates_on_device:
                loads = unit.numel * self.item + self._update_bytes(unit)
                total.add(Traffic(h2d=loads, d2h=self._update_bytes(unit)))
            else:
                total.add(Traffic(host=(HOST_UPDATE if self.adam else 28) * unit.numel))
        return total

    # ---- phases ----------------------------------------------------------------------------------------------------

    def _phase(self, name: str, device: Mapping[str, int], total: _Total) -> PhaseCost:
        device = {what: count for what, count in device.items() if count}
        return PhaseCost(
            name,
            device_bytes=sum(device.values()),
            host_bytes=sum(self.host.values()),
            h2d_bytes=int(total.h2d * self.workload.gradient_accumulation_steps),
            d2h_bytes=int(total.d2h * self.workload.gradient_accumulation_steps),
            flops=int(total.flops * self.workload.gradient_accumulation_steps),
            seconds=total.seconds * (1 if name == "update" else self.workload.gradient_accumulation_steps),
            breakdown={f"device: {what}": count for what, count in device.items()}
            | {f"host: {what}": count for what, count in self.host.items()},
        )

    def _reward(self, load: RewardLoad, residency: str) -> PhaseCost:
        device = dict(self.fixed)
        total = _Total(self.machine)
        reload = 0
        if residency == "off":
            reload = device["resident weights"]
            device |= dict.fromkeys(("resident weights", "weight slots", "gradient buffer", "staging"), 0)
        total.add(Traffic(h2d=reload + load.weight_bytes))
        total.add(Traffic(flops=load.flops * self.batch))
        device["reward"] = load.weight_bytes + self._plan.reward_microbatch * load.activation_bytes
        return self._phase("reward", device, total)


def _pages(specs: Specs, rows: int) -> int:
    """Host memory of states (rows, *shape) of each spec."""
    return _page(state_bytes(specs, rows))


def _page(count: int) -> int:
    return -(-count // PAGE) * PAGE
