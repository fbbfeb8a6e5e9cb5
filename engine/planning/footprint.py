"""What a step holds on the device and on the host, in each of its phases.

Activations are counted a block at a time (stage_costs.py). All else is arithmetic over the units, and mirrors what
weights.py, gradients.py, activations.py, passes.py, backward.py and hoisting.py allocate. All per-sample tensors of a
step (latents, prompt embeddings, gradients between the phases) are on the host.

What is allocated on first use and then kept (staging slots, the gradient buffer) counts in every phase, as it does from
the second step on.
"""

from __future__ import annotations

from functools import cached_property
from math import prod

from leapalign.engine.passes.hoisting import ROWS
from leapalign.engine.planning.planned_step import PlannedStep, page
from leapalign.engine.planning.stage_costs import Part, rounded, state_bytes
from leapalign.engine.streaming.activations import STAGING_SLOTS
from leapalign.engine.streaming.weights import SCRATCH_BYTES

HOST_BASE = 2**30  # Python, torch and the CUDA context's share of host memory
UPDATE_BYTES = 96 * 2**20  # temporaries of an update on the device, or of a norm: 2^20 elements in pieces, in torch
TRANSFORMERS = ("resident weights", "weight slots", "gradient buffer", "staging")  # may leave the device for the reward


class Footprint:
    """{what: bytes} of each phase's peak. Dictionaries without zeros are what `PhaseCost.breakdown` shows."""

    def __init__(self, setting: PlannedStep, device_base_bytes: int) -> None:
        self._of, self._base = setting, device_base_bytes

    # ---- the device ------------------------------------------------------------------------------------------------

    @cached_property
    def fixed(self) -> dict[str, int]:
        """What the device holds in all phases but the reward's."""
        of = self._of
        found = {"base": self._base, **of.once("weights", (of.plan.keeps_ends, of.kept, of.plan.slots), self._weights)}
        found["gradient buffer"] = rounded(of.largest * of.sum_item) if of.workload.legs else 0
        staging = 0 if of.device_states else STAGING_SLOTS * of.once("staging", (of.rows,), self._staging_slot)
        found["staging"] = staging
        found["activated embeddings"] = rounded(of.hoisted_rows * of.costs.width * of.item)
        if of.device_states:
            found["modulation vectors"] = self._modulation_bytes
            found["kept block inputs"] = self._record_bytes[0]
        return found

    def _weights(self) -> dict[str, int]:
        """What is allocated when the model is made."""
        of, units = self._of, self._of.costs.units
        streamed = [unit.numel * of.item for name, unit in units.items() if name not in of.resident]
        slot = max([min(SCRATCH_BYTES, of.largest * of.item), *streamed])
        return {
            "resident weights": sum(rounded(units[name].numel * of.item) for name in of.resident),
            "weight slots": of.plan.slots * rounded(slot),
            "buffers": of.costs.buffer_bytes,
        }

    def _staging_slot(self) -> int:
        """The largest that travels at once."""
        of, sizes = self._of, [0]
        if of.costs.hoisted:
            rows = max(min(ROWS, of.hoisted_rows), of.batch)  # into the states; a leg's gradients back at once
            sizes.append(max(rows * part.given * of.item for part in of.costs.kinds))
        sizes += [state_bytes(part.carried, of.rows) for part in of.costs.kinds]
        return rounded(max(sizes))

    @property
    def _modulation_bytes(self) -> int:
        of = self._of
        return of.once("modulation", (), lambda: self._vectors(of.hoisted_rows))

    def _vectors(self, rows: int) -> int:
        """Modulation of so many rows, of all blocks."""
        return sum(count * rounded(rows * part.given * self._of.item) for part, count in self._of.modulated())

    @property
    def _record_bytes(self) -> tuple[int, int]:
        """Of the kept block inputs, on the device and on the host."""
        of = self._of

        def one_leg() -> tuple[int, int]:
            sizes = [state_bytes(part.carried, of.batch) for part in of.kept_positions]
            return sum(sizes), sum(map(page, sizes))

        device, host = of.once("record", (of.plan.every,), one_leg)
        return of.record_legs * device, of.record_legs * host

    @property
    def _widest(self) -> Part:
        kinds = self._of.costs.kinds
        return self._of.once("widest", (), lambda: max(kinds, key=lambda part: state_bytes(part.carried, 1)))

    def hoist(self) -> dict[str, int]:
        """Modulation of all noise levels."""
        of = self._of
        rows = min(ROWS, of.hoisted_rows)
        vectors = max(part.given for part in of.costs.kinds) * rows * of.item
        return self.fixed | {
            "parts of the embeddings": self.fixed["activated embeddings"],
            "activations": max(2 * rounded(vectors), of.costs.condition(rows).device_bytes),
            "kept block inputs": 0,
        }

    def forward(self) -> dict[str, int]:
        """A pass without grad over the batch."""
        of = self._of
        return self.fixed | of.once("forward", (of.rows, of.device_states), self._forward)

    def _forward(self) -> dict[str, int]:
        of, head = self._of, self._of.costs.parts[-1]
        on_device = of.device_states or of.rows >= of.batch
        peak, states, outputs = 0, 0, 0
        for part in of.costs.kinds:
            call = of.costs.forward(part, of.rows)
            carried = 0
            if on_device:
                carried = state_bytes(part.carried, of.batch)
                carried += state_bytes(part.leaving, of.batch) if part is not head else 0
            if part is head:
                outputs = 2 * state_bytes(part.leaving, of.batch)
            before = state_bytes(part.carried, of.rows)  # the last call's result lives until the next one is there
            found = max(call.device_bytes + before, call.kept_bytes + outputs) + carried
            if found > peak:
                peak, states = found, carried
        return {"constants": self._constants(1), "states": states, "activations": peak - states}

    def backward(self, legs: int, params: bool, *, deliver: bool) -> dict[str, int]:
        """A product of so many legs; with `params` of weights, which `deliver` updates."""
        of = self._of
        decisions = (legs, params, deliver, of.rows, of.device_states, of.plan.every, of.updates_on_device)
        return self.fixed | of.once("backward", decisions, lambda: self._backward(legs, params, deliver))

    def _backward(self, legs: int, params: bool, deliver: bool) -> dict[str, int]:
        of, costs = self._of, self._of.costs
        single = legs * -(-of.batch // of.rows) == 1  # one microbatch: its states stay on the device
        on_device, rows = of.device_states or single, legs * of.batch
        recomputed = 0
        if on_device:
            recomputed = (min(of.plan.every, len(of.blocks)) - 1) * state_bytes(self._widest.carried, 1) * rows
        peak, states = 0, 0
        for part in costs.kinds:
            call = costs.backward(part, of.rows, params=params)
            carried = recomputed
            if on_device:
                leaving = part.leaving if part is not costs.parts[-1] else ()
                carried += legs * (state_bytes(leaving, of.batch) + state_bytes(part.carried, of.batch))
            if call.device_bytes + carried > peak:
                peak, states = call.device_bytes + carried, carried
        gradients = 0
        if params and not costs.hoisted:
            gradients = legs * rounded(of.batch * costs.width * of.sum_item)
        if params and costs.hoisted:
            gradients = rounded(rows * costs.width * of.sum_item)
            gradients += legs * self._vectors(of.batch) if of.device_states else 0
            wide = max(part.given for part in costs.kinds) * of.item
            linears = 2 * rounded(rows * wide) + 3 * rounded(rows * costs.width * of.sum_item)
            embedders = costs.condition_backward(min(ROWS, of.batch)).device_bytes
            peak = max(peak, linears, embedders)
        if params and deliver and of.updates_on_device:
            peak = max(peak, UPDATE_BYTES)
        states = min(states, peak)
        return {
            "constants": self._constants(legs),
            "modulation gradients": gradients,
            "states": states,
            "activations": peak - states,
        }

    def _constants(self, evaluations: int) -> int:
        call = self._of.costs.constants()
        return (evaluations - 1) * call.kept_bytes + call.device_bytes if evaluations > 1 else call.kept_bytes

    def update(self) -> dict[str, int]:
        """Of gradients that waited on the host."""
        activations = UPDATE_BYTES if self._of.updates_on_device else 0
        gone = {"activated embeddings": 0, "modulation vectors": 0, "kept block inputs": 0}
        return self.fixed | gone | {"activations": activations}

    def beside_reward(self, residency: str) -> dict[str, int]:
        """What stays on the device while the reward runs: with or without the transformer's weights."""
        return self.fixed | (dict.fromkeys(TRANSFORMERS, 0) if residency == "off" else {})

    # ---- the host --------------------------------------------------------------------------------------------------

    @cached_property
    def host(self) -> dict[str, int]:
        """What the host holds; it is much the same in all phases, as memory of the step is kept for the next one."""
        of, workload = self._of, self._of.workload
        weights, optimizer = of.once("host units", (), self._host_units)
        waits = workload.legs and not of.updates_on_device
        found = {
            "weights": weights,
            "optimizer": optimizer,
            "held gradients": weights if of.mode_holds or workload.holds else 0,
            "gradient on its way": page(of.largest * of.sum_item) if waits else 0,
            "kept block inputs": 0 if of.device_states else self._record_bytes[1],
            "states": self._host_states,
            "modulation vectors": 0 if of.device_states else self._modulation_bytes,
            "latents and prompts": of.once("samples", (), self._samples),
            "buffers": of.costs.buffer_bytes,
            "reward": max((reward.weight_bytes for reward in workload.rewards), default=0),
            "base": HOST_BASE,
        }
        return {what: count for what, count in found.items() if count}

    def _host_units(self) -> tuple[int, int]:
        """Of weights, and of all that the optimizer keeps."""
        of, units = self._of, self._of.costs.units.values()
        return sum(page(unit.numel * of.item) for unit in units), sum(of.state_bytes(unit) for unit in units)

    @property
    def _host_states(self) -> int:
        """The pool of states between two blocks: of the rollout, or gradients and recomputed inputs of all legs."""
        of = self._of
        if of.device_states or (of.rows >= of.batch and of.legs <= 1):
            return 0
        several = max(2, 2 * of.legs + (min(of.plan.every, len(of.blocks)) - 1) * of.legs)
        return several * page(state_bytes(self._widest.carried, of.batch))

    def _samples(self) -> int:
        """Latents of all steps, velocities, gradients and the prompts' embeddings."""
        of, shapes = self._of, self._of.costs.input_specs
        inputs = sum(of.batch * prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        latents = prod(shapes["hidden_states"][0]) * 4 if "hidden_states" in shapes else 0
        return inputs + of.batch * latents * (of.workload.num_inference_steps + 3 * of.workload.legs + 2)
