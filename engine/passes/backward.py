"""The layer-major backward pass: the forward pass in reverse, each block recomputed from its stored input.

A block's weights come once; all legs and microbatches are differentiated by autograd, one at a time, and their weight
gradients are added into one buffer. One block's activations and one unit's gradients are all that the device holds,
whatever the model's depth and the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from leapalign.engine.backbones import Stage
from leapalign.engine.passes.evaluation import Evaluation, Leg, specs
from leapalign.engine.passes.forward import Parts, Reads, embed, prefetch, run_stage
from leapalign.engine.streaming.activations import SampleStates
from leapalign.engine.streaming.gradients import Sink, accumulation
from leapalign.engine.streaming.partition import modulation_unit


@dataclass
class Cotangents:
    """A leg in the backward pass.

    Attributes:
        arriving: gradient of the states between two stages, at the stage that is differentiated next.
        temb: (B, D) float32 (float64) gradient of temb, summed over the stages; without hoisting.
        modulation: {stage name: gradient of its modulation vectors (B, width)}; with hoisting.
        inputs: {input name: its gradient (B, ...)}.
    """

    leg: Leg
    evaluation: Evaluation
    arriving: SampleStates | None = None
    leaving: SampleStates | None = None
    temb: Tensor | None = None
    modulation: dict[str, SampleStates] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def advance(self) -> None:
        if self.arriving is not None:
            self.arriving.drop()
        self.arriving, self.leaving = self.leaving, None


class Backward:
    """One vector-Jacobian pass over some legs together.

    Args:
        legs: with their evaluations, whose records are complete.
        params: "none", "accumulate" (onto the sum of `kind`) or "deliver" (to the sink, on top of the held sum).
    """

    def __init__(
        self, parts: Parts, legs: Sequence[tuple[Leg, Evaluation]], params: str, kind: str, sink: Sink | None
    ) -> None:
        self.parts, self.params, self.kind, self.sink = parts, params, kind, sink
        self.legs = [Cotangents(leg, evaluation) for leg, evaluation in legs]
        backbone = parts.backbone
        names = {name for leg, _ in legs for name in leg.input_grads}
        condition = backbone.condition
        # Is anything wanted of temb, and so of the modulations?
        self.wants_condition = condition is not None and (
            bool(names & set(backbone.condition_inputs)) or bool(self.wanted(parts.unit_of[condition.name]))
        )
        modulated = [stage for stage in (backbone.head, *reversed(backbone.blocks)) if stage.modulation]
        self.modulated = [
            stage for stage in modulated if self.wants_condition or self.wanted(modulation_unit(stage))
        ]  # fmt: skip
        self._modulated = {stage.name for stage in self.modulated}
        stem = parts.unit_of[backbone.stem.name]
        self.wants_stem = bool(names - set(backbone.condition_inputs)) or bool(self.wanted(stem))
        stages = [backbone.head, *reversed(backbone.blocks), *([backbone.stem] if self.wants_stem else [])]
        visits = [parts.unit_of[stage.name] for stage in stages] + [modulation_unit(stage) for stage in self.modulated]
        if self.wants_condition and condition is not None:
            visits.append(parts.unit_of[condition.name])
        self.left = Counter(visits)  # visits to come, by unit: a tied weight's gradient is finished after the last

    def wanted(self, unit: str) -> tuple[str, ...]:
        """Names of the unit's parameters whose gradient is wanted."""
        return self.parts.trainable(unit) if self.params != "none" else ()

    def run(self) -> list[dict[str, Tensor]]:
        """Gradients of the inputs that each leg asked for."""
        backbone, every = self.parts.backbone, self.parts.plan.every
        last = len(backbone.blocks)
        embed(self.parts, [leg.evaluation for leg in self.legs])
        starts = list(reversed(range(0, last, every)))
        self._stage(backbone.head, last, following=starts[0])
        for start, earlier in zip(starts, [*starts[1:], -1], strict=True):
            stop = min(start + every, last)
            self._recompute(start, stop)
            for position in reversed(range(start, stop)):
                following = position - 1 if position > start else earlier
                self._stage(backbone.blocks[position], position, following)
                for leg in self.legs:
                    if position in leg.evaluation.recomputed:
                        leg.evaluation.recomputed.pop(position).drop()
        if self.wants_stem:
            self._stem()
        for leg in self.legs:
            leg.advance()
        return [leg.inputs for leg in self.legs]

    def finish(self, unit: str) -> None:
        """The gradient buffer holds all that this visit adds to the unit."""
        self.left[unit] -= 1
        if not self.wanted(unit):
            return
        if self.params == "accumulate":
            self.parts.gradients.carry(unit, self.kind)
        elif self.left[unit] > 0:
            self.parts.gradients.carry(unit, "held")
        else:
            assert self.sink is not None
            self.parts.gradients.deliver(unit, self.wanted(unit), self.sink)

    def sum(self, unit: str, stack: ExitStack) -> dict[str, Tensor]:
        """Where the unit's wanted gradients are added up; empty if there are none."""
        if not self.wanted(unit):
            return {}
        carry = self.kind if self.params == "accumulate" else "held"
        sums = stack.enter_context(self.parts.gradients.sum(unit, carry=carry))
        return {name: sums[name] for name in self.wanted(unit)}

    # ---- stages ----------------------------------------------------------------------------------------------------

    def _work(self) -> list[tuple[Cotangents, slice]]:
        return [(leg, rows) for leg in self.legs for rows in leg.evaluation.slices()]

    def _stage(self, stage: Stage, position: int, following: int) -> None:
        """Differentiate the head or a block: arriving gradients become leaving ones.

        Args:
            following: the block that runs next, if only to be recomputed; -1 for the stem.
        """
        parts, unit, work = self.parts, self.parts.unit_of[stage.name], self._work()
        placement = parts.placement([(leg.evaluation, rows) for leg, rows in work])
        with ExitStack() as outer:
            sums = self.sum(unit, outer)
            with parts.weights.use(unit) as weights:
                ahead = parts.backbone.blocks[following] if following >= 0 else parts.backbone.stem
                if following >= 0 or self.wants_stem:
                    parts.weights.prefetch(parts.unit_of[ahead.name])
                leaves = leaves_of(weights, sums)
                for number, (leg, rows) in enumerate(work):
                    with ExitStack() as stack:
                        reads = self._reads(stage, position, leg, rows)
                        carried, *rest = [stack.enter_context(states.read(index)) for states, index in reads]
                        if number + 1 < len(work):
                            prefetch(self._reads(stage, position, *work[number + 1]))
                        cotangent: Sequence[Tensor] | None = rest.pop() if leg.arriving is not None else None
                        self._differentiate(stage, leaves, sums, leg, rows, carried, rest, cotangent, placement)
        self.finish(unit)
        for leg in self.legs:
            leg.advance()

    def _reads(self, stage: Stage, position: int, leg: Cotangents, rows: slice) -> Reads:
        """Block input, modulation vectors if they are hoisted, and the arriving gradient (none at the head)."""
        reads = [*leg.evaluation.input_reads(position, rows), *leg.evaluation.condition_reads(stage, rows)]
        return reads if leg.arriving is None else [*reads, (leg.arriving, rows)]

    def _differentiate(
        self, stage: Stage, weights: Mapping[str, Tensor], sums: Mapping[str, Tensor], leg: Cotangents, rows: slice,
        carried: Sequence[Tensor], condition: Sequence[tuple[Tensor, ...]], cotangent: Sequence[Tensor] | None,
        placement: Literal["device", "host"],
    ) -> None:  # fmt: skip
        """One microbatch of one leg: recompute, differentiate, add, and pass the input gradient on."""
        parts, evaluation = self.parts, leg.evaluation
        inputs = [value.detach().requires_grad_() for value in carried]
        given: Tensor | None = None
        wants_given = stage.name in self._modulated if condition else self.wants_condition
        if condition or evaluation.temb is not None:
            source = condition[0][0] if condition else evaluation.temb[rows] if evaluation.temb is not None else None
            assert source is not None
            given = source.detach().requires_grad_(wants_given)
        with torch.enable_grad():
            constants = evaluation.constants_of(parts.backbone, rows, parts.device)
            output = stage.run(weights, tuple(inputs), given, constants)
        outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        if cotangent is None:
            cotangent = [leg.leg.cotangent[rows].to(parts.device, outputs[0].dtype)]
        targets = [*inputs, *([given] if given is not None and wants_given else [])]
        found = differentiate(outputs, targets, weights, sums, cotangent)
        del output, outputs
        leaving = [
            torch.zeros_like(x, requires_grad=False) if g is None else g for x, g in zip(inputs, found, strict=False)
        ]
        if leg.leaving is None:
            leg.leaving = parts.staging.states(placement, evaluation.size, specs(leaving))
        leg.leaving.write(rows, leaving)
        if given is not None and wants_given and (gradient := found[len(inputs)]) is not None:
            self._pass_on_condition(stage, leg, rows, gradient, hoisted=bool(condition))

    def _pass_on_condition(
        self, stage: Stage, leg: Cotangents, rows: slice, gradient: Tensor, *, hoisted: bool
    ) -> None:
        if not hoisted:
            if leg.temb is None:
                shape = (leg.evaluation.size, gradient.shape[1])
                leg.temb = torch.zeros(shape, dtype=accumulation(gradient.dtype), device=gradient.device)
            leg.temb[rows] += gradient
            return
        if stage.name not in leg.modulation:
            spec = [((gradient.shape[1],), gradient.dtype)]
            placement = self.parts.plan.block_inputs
            leg.modulation[stage.name] = self.parts.staging.states(placement, leg.evaluation.size, spec)
        leg.modulation[stage.name].write(rows, [gradient])

    def _stem(self) -> None:
        parts, stage = self.parts, self.parts.backbone.stem
        unit = parts.unit_of[stage.name]
        with ExitStack() as outer:
            sums = self.sum(unit, outer)
            with parts.weights.use(unit) as weights:
                leaves = leaves_of(weights, sums)
                for leg, rows in self._work():
                    names = [name for name in leg.leg.input_grads if name not in parts.backbone.condition_inputs]
                    if not names and not sums:
                        continue
                    assert leg.arriving is not None
                    given = leg.evaluation.rows(rows, parts.device)
                    given |= {name: given[name].detach().requires_grad_() for name in names}
                    with torch.enable_grad():
                        outputs = tuple(stage.run(leaves, given))
                    with leg.arriving.read(rows) as cotangent:
                        found = differentiate(outputs, [given[name] for name in names], leaves, sums, cotangent)
                    del outputs
                    self.add_inputs(leg, rows, names, found)
        self.finish(unit)

    def add_inputs(self, leg: Cotangents, rows: slice, names: Sequence[str], found: Sequence[Tensor | None]) -> None:
        """Write the gradients of some inputs, in the input's dtype, beside the leg's cotangent."""
        for name, gradient in zip(names, found, strict=False):
            if name not in leg.inputs:
                leg.inputs[name] = torch.zeros_like(leg.evaluation.inputs[name], device=leg.leg.cotangent.device)
            if gradient is not None:
                leg.inputs[name][rows] = gradient.to(leg.inputs[name].device)

    @torch.no_grad()
    def _recompute(self, start: int, stop: int) -> None:
        """The inputs of blocks start + 1 ... stop - 1, from the kept input of block `start`."""
        parts, work = self.parts, self._work()
        placement = parts.placement([(leg.evaluation, rows) for leg, rows in work])
        for position in range(start, stop - 1):
            stage = parts.backbone.blocks[position]
            with parts.weights.use(parts.unit_of[stage.name]) as weights:
                parts.weights.prefetch(parts.unit_of[parts.backbone.blocks[position + 1].name])
                for leg, rows in work:
                    evaluation = leg.evaluation
                    reads = [*evaluation.input_reads(position, rows), *evaluation.condition_reads(stage, rows)]
                    with ExitStack() as stack:
                        carried, *condition = [stack.enter_context(states.read(index)) for states, index in reads]
                        values = run_stage(parts, stage, weights, evaluation, rows, carried, condition)
                    if position + 1 not in evaluation.recomputed:
                        states = parts.staging.states(placement, evaluation.size, specs(values))
                        evaluation.recomputed[position + 1] = states
                    evaluation.recomputed[position + 1].write(rows, values)


def leaves_of(weights: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as leaves of a graph: those with a sum want a gradient."""
    return {name: weight.detach().requires_grad_(name in sums) for name, weight in weights.items()}


def differentiate(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Mapping[str, Tensor], sums: Mapping[str, Tensor],
    cotangent: Sequence[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of `targets`; those of the weights are added to their sums as they come, and freed.

    Args:
        outputs: of one graph.
        targets: leaves of it.
        weights: of which the leaves with a sum want a gradient.
        cotangent: a gradient for each output.
    """
    # Only what targets and sums reach, e.g. prompt embeddings that need no gradient reach one of the stem's outputs.
    reached = [(output, c) for output, c in zip(outputs, cotangent, strict=True) if output.requires_grad]
    leaves = [*targets, *(weights[name] for name in sums)]
    if reached and leaves:
        hooks = [weights[name].register_post_accumulate_grad_hook(partial(_add, sums[name])) for name in sums]
        try:
            outputs, cotangent = zip(*reached, strict=True)
            torch.autograd.backward(outputs, cotangent, inputs=leaves)
        finally:
            for hook in hooks:
                hook.remove()
    found = [target.grad for target in targets]
    for target in targets:
        target.grad = None
    return found


def _add(total: Tensor, leaf: Tensor) -> None:
    assert leaf.grad is not None
    total.add_(leaf.grad)
    leaf.grad = None


def check_input_grads(legs: Sequence[Leg]) -> None:
    """ValueError if there is no leg, or `input_grads` of one names no floating input."""
    if not legs:
        raise ValueError("a product of no legs: give at least one")
    for leg in legs:
        for name in leg.input_grads:
            value = leg.inputs.get(name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise ValueError(f"input_grads names {name!r}, which is no floating tensor among the leg's inputs")
