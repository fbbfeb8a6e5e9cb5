"""Hoisted modulation in passes: all adaLN linears once for many noise levels, and the gradients of what lies behind.

m_i = silu(temb) W_i^T + b_i                                  forward, block by block, for N rows
dW_i = dm_i^T silu(temb),  db_i = sum of dm_i's rows          delivered as factors
dL/dtemb = silu'(temb) sum_i dm_i W_i                         read from W_i before W_i is handed to an optimizer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from leapalign.engine.backbones import Stage
from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.backbones.velocity import microbatches, select
from leapalign.engine.passes.backward import Backward, Cotangents, differentiate, leaves_of
from leapalign.engine.passes.evaluation import Modulations
from leapalign.engine.passes.forward import Parts
from leapalign.engine.streaming.gradients import accumulation
from leapalign.engine.streaming.partition import modulation_unit

TILE = 2**22  # elements of a linear's gradient that are multiplied out at once: 16 MiB
ROWS = 64  # rows at once: 4.5 MiB of FLUX.1's widest modulation, while its weights are read once for all of them


@torch.no_grad()
def hoist(parts: Parts, inputs: Mapping[str, Any]) -> Modulations:
    """The modulation vectors of all stages for N rows of the condition's inputs; the weights are streamed once."""
    backbone = parts.backbone
    condition = backbone.condition
    assert condition is not None
    size = int(next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor)))
    activated = []
    with parts.weights.use(parts.unit_of[condition.name]) as weights:
        for rows in microbatches(size, ROWS):
            given = {name: value.to(parts.device) for name, value in select(inputs, rows).items()}
            activated.append(torch.nn.functional.silu(condition.run(weights, given)))
    result = Modulations(torch.cat(activated))
    stages = [stage for stage in (*backbone.blocks, backbone.head) if stage.modulation]
    for number, stage in enumerate(stages):
        with parts.weights.use(modulation_unit(stage)) as weights:
            if number + 1 < len(stages):
                parts.weights.prefetch(modulation_unit(stages[number + 1]))
            width = sum(weights[f"{linear}.weight"].shape[0] for linear in stage.modulation)
            states = parts.staging.states(parts.plan.block_inputs, size, [((width,), result.activated.dtype)])
            for rows in microbatches(size, ROWS):
                vectors = [
                    torch.nn.functional.linear(
                        result.activated[rows], weights[f"{linear}.weight"], weights.get(f"{linear}.bias")
                    )
                    for linear in stage.modulation
                ]
                states.write(rows, [torch.cat(vectors, dim=1)])
            result.states[stage.name] = states
    return result


class HoistedBackward:
    """What follows the blocks' backward pass: modulation linears, then the embedders behind temb."""

    def __init__(self, backward: Backward, factors: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
        """
        Args:
            factors: held gradients of modulation linears, {unit: [(left (R, width), right (R, D)) on the host]}.
        """
        self.backward, self.parts, self.factors = backward, backward.parts, factors
        self.activated: dict[int, Tensor] = {}  # id(leg) -> dL/dsilu(temb) (B, D)

    @torch.no_grad()
    def run(self) -> None:
        """Finish every gradient that depends on temb."""
        stages = self.backward.modulated
        for number, stage in enumerate(stages):
            with self.parts.weights.use(modulation_unit(stage)) as weights:
                if number + 1 < len(stages):
                    self.parts.weights.prefetch(modulation_unit(stages[number + 1]))
                left = [self._arriving(stage, leg, weights) for leg in self.backward.legs]
            self._finish_linears(stage, torch.cat(left))
        if self.backward.wants_condition:
            self._condition()

    def _arriving(self, stage: Stage, leg: Cotangents, weights: Mapping[str, Tensor]) -> Tensor:
        """(B, width) gradient of a leg's modulation vectors; its share of dL/dsilu(temb) is added on the way."""
        size = leg.evaluation.size
        widths = [weights[f"{linear}.weight"].shape[0] for linear in stage.modulation]
        states = leg.modulation.pop(stage.name, None)
        if states is None:  # the output does not depend on them
            dtype = leg.evaluation.modulations.source.activated.dtype if leg.evaluation.modulations else None
            return torch.zeros(size, sum(widths), dtype=dtype, device=self.parts.device)
        with states.read(slice(0, size)) as (values,):
            gradient = values.clone()
        states.drop()
        total = self.activated.get(id(leg))
        for linear, part in zip(stage.modulation, gradient.split(widths, dim=1), strict=True):
            share = (part @ weights[f"{linear}.weight"]).to(accumulation(part.dtype))
            total = share if total is None else total.add_(share)
        assert total is not None
        self.activated[id(leg)] = total
        return gradient

    def _finish_linears(self, stage: Stage, left: Tensor) -> None:
        """Carry or deliver the gradients of one stage's linears, from the factors of all legs."""
        backward, unit = self.backward, modulation_unit(stage)
        backward.left[unit] -= 1
        wanted = backward.wanted(unit)
        if not wanted:
            return
        right = torch.cat([self._inputs_of_linears(leg) for leg in backward.legs])
        if backward.params == "accumulate" and backward.kind == "held":
            self.factors.setdefault(unit, []).append((left.cpu(), right.cpu()))
            return
        if backward.params == "accumulate":  # a gradient that a foreign optimizer will read: dense
            with ExitStack() as stack:
                sums = backward.sum(unit, stack)
                for name, gradient in self._gradients(stage, left, right).items():
                    if name not in sums:
                        continue
                    if not isinstance(gradient, OuterProduct):
                        sums[name].add_(gradient)
                        continue
                    for rows, tile in gradient.tiles(TILE, dtype=sums[name].dtype):
                        sums[name][rows].add_(tile)
            self.parts.gradients.carry(unit, backward.kind)
            return
        sink = backward.sink
        assert sink is not None
        held = self.factors.pop(unit, [])
        target = torch.device("cpu") if sink.on_host else self.parts.device
        left = torch.cat([left.to(target), *(part.to(target) for part, _ in held)])
        right = torch.cat([right.to(target), *(part.to(target) for _, part in held)])
        sink(unit, {name: g for name, g in self._gradients(stage, left, right).items() if name in wanted})

    def _gradients(self, stage: Stage, left: Tensor, right: Tensor) -> dict[str, Tensor | OuterProduct]:
        return gradients_of_linears(self.parts, stage, left, right)

    def _inputs_of_linears(self, leg: Cotangents) -> Tensor:
        """(B, D) silu(temb) of a leg's samples."""
        rows = leg.evaluation.modulations
        assert rows is not None
        return rows.source.activated[list(rows.index)]

    def _condition(self) -> None:
        """Gradients of the time, guidance and pooled-text embedders, and of their inputs."""
        backward, parts = self.backward, self.parts
        stage = parts.backbone.condition
        assert stage is not None
        unit = parts.unit_of[stage.name]
        with ExitStack() as stack:
            sums = backward.sum(unit, stack)
            weights = stack.enter_context(parts.weights.use(unit))
            leaves = leaves_of(weights, sums)
            for leg in backward.legs:
                for rows in microbatches(leg.evaluation.size, ROWS):
                    self._embedders(stage, leg, rows, leaves, sums)
        backward.finish(unit)

    def _embedders(
        self, stage: Stage, leg: Cotangents, rows: slice, leaves: Mapping[str, Tensor], sums: Mapping[str, Tensor]
    ) -> None:
        hoisted = self.activated.get(id(leg))
        arriving = leg.temb if hoisted is None else hoisted
        names = [name for name in leg.leg.input_grads if name in self.parts.backbone.condition_inputs]
        if arriving is None or not (names or sums):
            return
        given = leg.evaluation.rows(rows, self.parts.device, self.parts.backbone.condition_inputs)
        given |= {name: given[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            temb = stage.run(leaves, given)
            # silu' once, in float32, for the sum over all linears.
            output = temb if hoisted is None else torch.nn.functional.silu(temb.to(hoisted.dtype))
        cotangent = arriving[rows].to(output.dtype)
        found = differentiate([output], [given[name] for name in names], leaves, sums, [cotangent])
        self.backward.add_inputs(leg, rows, names, found)


def gradients_of_linears(parts: Parts, stage: Stage, left: Tensor, right: Tensor) -> dict[str, Tensor | OuterProduct]:
    """{full name: gradient} of a stage's hoisted linears, from factors (R, width) and (R, D)."""
    shapes = parts.store.units[modulation_unit(stage)].shapes
    widths = [shapes[f"{linear}.weight"][0] for linear in stage.modulation]
    found: dict[str, Tensor | OuterProduct] = {}
    for linear, part in zip(stage.modulation, left.split(widths, dim=1), strict=True):
        found[f"{linear}.weight"] = OuterProduct(part, right)
        if f"{linear}.bias" in shapes:
            found[f"{linear}.bias"] = part.sum(0, dtype=accumulation(part.dtype))
    return found


def held_linears(
    parts: Parts, factors: Mapping[str, list[tuple[Tensor, Tensor]]], trainable: Callable[[str], tuple[str, ...]]
) -> dict[str, dict[str, Tensor | OuterProduct]]:
    """{unit: {full name: gradient}} of held factors, see `HoistedBackward`."""
    found = {}
    for stage in (*parts.backbone.blocks, parts.backbone.head):
        unit = modulation_unit(stage)
        if unit in factors:
            left, right = (torch.cat(side) for side in zip(*factors[unit], strict=True))
            gradients = gradients_of_linears(parts, stage, left, right)
            found[unit] = {name: gradients[name] for name in trainable(unit)}
    return found
