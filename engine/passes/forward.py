"""The layer-major forward pass: every microbatch goes through one block while its weights are on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leapalign.engine.backbones import Backbone, Stage
from leapalign.engine.memory.store import BlockStore
from leapalign.engine.passes.evaluation import Evaluation, Rows
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.activations import SampleStates, Staging
from leapalign.engine.streaming.gradients import Gradients
from leapalign.engine.streaming.weights import Weights

Reads = list[tuple[SampleStates, Rows]]
Work = tuple[Evaluation, slice]


@dataclass
class Parts:
    """What a pass works with.

    Attributes:
        unit_of: {stage name: the unit that holds its weights}; `modulation_unit(stage)` names its hoisted linears'.
        trainable: unit -> the names of its parameters that require grad now.
    """

    backbone: Backbone
    plan: MemoryPlan
    store: BlockStore
    weights: Weights
    gradients: Gradients
    staging: Staging
    device: torch.device
    unit_of: Mapping[str, str]
    trainable: Callable[[str], tuple[str, ...]]

    def placement(self, work: Sequence[Work]) -> Literal["device", "host"]:
        """Where per-sample states of a pass wait: a single microbatch's are needed again at once."""
        return "device" if len(work) == 1 else self.plan.block_inputs


@torch.no_grad()
def forward(parts: Parts, evaluations: Sequence[Evaluation], *, head: bool = True) -> list[Tensor]:
    """The velocities (B, ...) of all evaluations on the device, block inputs going into their records.

    Args:
        head: False stops at the head's input and returns nothing; for the sake of the records.
    """
    backbone, last = parts.backbone, len(parts.backbone.blocks)
    work = [(evaluation, rows) for evaluation in evaluations for rows in evaluation.slices()]
    placement = parts.placement(work)
    embed(parts, evaluations)
    stages = [backbone.stem, *backbone.blocks, *([backbone.head] if head else [])]
    outputs: list[Tensor] = []
    found: dict[int, list[Tensor]] = {}

    for position, stage in enumerate(stages, -1):
        with parts.weights.use(parts.unit_of[stage.name]) as weights:
            if position + 2 < len(stages):
                parts.weights.prefetch(parts.unit_of[stages[position + 2].name])
            for number, (evaluation, rows) in enumerate(work):
                if position < 0:
                    values = stage.run(weights, evaluation.rows(rows, parts.device))
                else:
                    reads = _forward_reads(stage, evaluation, rows)
                    with ExitStack() as stack:
                        (carried, *condition) = [stack.enter_context(states.read(index)) for states, index in reads]
                        if number + 1 < len(work):
                            prefetch(_forward_reads(stage, *work[number + 1]))
                        values = run_stage(parts, stage, weights, evaluation, rows, carried, condition)
                if position < last:
                    evaluation.put(position + 1, rows, values, parts.staging, placement)
                else:
                    found.setdefault(id(evaluation), []).append(values)
        for evaluation in evaluations:
            evaluation.advance()
    if head:
        outputs = [torch.cat(found[id(evaluation)]) for evaluation in evaluations]
    for evaluation in evaluations:
        evaluation.forget()
    return outputs


def embed(parts: Parts, evaluations: Sequence[Evaluation]) -> None:
    """temb of every evaluation whose modulation is not hoisted."""
    stage = parts.backbone.condition
    waiting = [e for e in evaluations if stage is not None and e.temb is None and e.modulations is None]
    if not waiting or stage is None:
        return
    with parts.weights.use(parts.unit_of[stage.name]) as weights, torch.no_grad():
        for e in waiting:
            e.temb = stage.run(weights, e.rows(slice(0, e.size), parts.device, parts.backbone.condition_inputs))


def _forward_reads(stage: Stage, evaluation: Evaluation, rows: slice) -> Reads:
    assert evaluation.carried is not None
    return [(evaluation.carried, rows), *evaluation.condition_reads(stage, rows)]


def prefetch(reads: Reads) -> None:
    """Start bringing in what the next microbatch reads."""
    for states, rows in reads:
        states.prefetch(rows)


def run_stage(
    parts: Parts, stage: Stage, weights: Mapping[str, Tensor], evaluation: Evaluation, rows: slice,
    carried: Sequence[Tensor], condition: Sequence[tuple[Tensor, ...]],
) -> Any:  # fmt: skip
    """A block or the head, with its modulation vectors, with temb, or without either."""
    given = condition[0][0] if condition else (evaluation.temb[rows] if evaluation.temb is not None else None)
    return stage.run(weights, tuple(carried), given, evaluation.constants_of(parts.backbone, rows, parts.device))
