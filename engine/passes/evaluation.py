"""Evaluations of a streamed model: their inputs, the per-sample tensors they leave, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from leapalign.engine.backbones import Backbone, Stage
from leapalign.engine.backbones.velocity import is_batched, microbatches, select
from leapalign.engine.streaming.activations import SampleStates, Staging

Rows = slice | list[int]


class Modulations:
    """Hoisted modulation: the outputs of all adaLN linears for N rows, one row a (sample, noise level).

    Attributes:
        states: {stage name: (N, width) states}.
        activated: (N, D) silu(temb) on the device, in the model's dtype: the linears' input.
        version: of the weights that they were made with; None when they are dropped.
    """

    def __init__(self, activated: Tensor) -> None:
        self.states: dict[str, SampleStates] = {}
        self.activated = activated
        self.version: int | None = None

    def rows(self, index: Sequence[int]) -> ModulationRows:
        """The rows `index`, one a sample of an evaluation."""
        return ModulationRows(self, tuple(index))

    def drop(self) -> None:
        """Give the memory back."""
        for states in self.states.values():
            states.drop()
        self.states.clear()
        self.version = None


@dataclass(frozen=True)
class ModulationRows:
    """Which rows of hoisted modulations belong to the B samples of an evaluation."""

    source: Modulations
    index: tuple[int, ...]


class Record:
    """Kept block inputs of some samples, from which the backward pass recomputes the blocks.

    Position p is the input of block p; the last position is the input of the head. Every n-th position is kept, and the
    last one.

    Attributes:
        version: of the weights that they were made with; None while nothing is kept.
    """

    def __init__(
        self, staging: Staging, placement: Literal["device", "host"], rows: int, every: int, last: int
    ) -> None:
        self.rows, self.placement = rows, placement
        self.states: dict[int, SampleStates] = {}
        self.version: int | None = None
        self._staging, self._every, self._last = staging, every, last

    def keeps(self, position: int) -> bool:
        """Whether this position's states are kept."""
        return position % self._every == 0 or position == self._last

    def at(self, position: int, like: Sequence[Tensor]) -> SampleStates:
        """The states at a position, made for tensors (b, ...) like these if there are none yet."""
        if position not in self.states:
            self.states[position] = self._staging.states(self.placement, self.rows, specs(like))
        return self.states[position]

    def drop(self) -> None:
        """Give the memory back; a leg without its record runs its forward pass again."""
        for states in self.states.values():
            states.drop()
        self.states.clear()
        self.version = None

    def __del__(self) -> None:
        self.drop()


@dataclass
class Leg:
    """One evaluation to be differentiated with a known cotangent.

    Attributes:
        inputs: the model's keyword arguments for B samples.
        cotangent: (B, ...) the gradient arriving at the model's output.
        input_grads: names of the inputs whose gradient is wanted.
        modulations: the samples' rows of `StreamedModel.hoist`; None: evaluated for this leg alone.
        record: block inputs that were kept of this evaluation; None: the forward pass is run first and leaves its
            record here, so that a second product with the same leg does without.
        record_rows: (B,) the samples' rows in the record; None: they are its rows in order.
    """

    inputs: Mapping[str, Any]
    cotangent: Tensor
    input_grads: tuple[str, ...] = ()
    modulations: ModulationRows | None = None
    record: Record | None = None
    record_rows: Sequence[int] | None = None


@dataclass
class Evaluation:
    """One evaluation of B samples inside a pass.

    Attributes:
        inputs: as the backbone accepted them.
        size: B.
        constants: what blocks and head need besides.
        modulations: hoisted modulations of the samples.
        temb: (B, D) the embedding of noise level, guidance and pooled text, if it is not hoisted.
        record: where block inputs are kept, or come from.
        kept: (row of this evaluation, row of the record) pairs.
        carried: the states between two blocks.
        recomputed: {position: states} between two kept positions.
    """

    inputs: Mapping[str, Any]
    size: int
    constants: Any
    microbatch: int | None
    modulations: ModulationRows | None = None
    temb: Tensor | None = None
    record: Record | None = None
    kept: Sequence[tuple[int, int]] = ()
    carried: SampleStates | None = None
    recomputed: dict[int, SampleStates] = field(default_factory=dict)
    _next: SampleStates | None = None
    _constants: dict[int, Any] = field(default_factory=dict)

    def slices(self) -> Iterator[slice]:
        """The microbatches."""
        return microbatches(self.size, self.microbatch)

    def rows(self, rows: slice, device: torch.device, names: Sequence[str] | None = None) -> dict[str, Any]:
        """The inputs of some samples, on the device."""
        chosen = self.inputs if names is None else {name: self.inputs[name] for name in names if name in self.inputs}
        return {
            name: _ordinary(value.to(device)) if isinstance(value, Tensor) else value
            for name, value in select(chosen, rows).items()
        }

    def constants_of(self, backbone: Backbone, rows: slice, device: torch.device) -> Any:
        """What blocks and head need besides, for these samples; made once."""
        if rows.start not in self._constants:
            self._constants[rows.start] = backbone.microbatch_constants(self.constants, self.rows(rows, device))
        return self._constants[rows.start]

    def condition_reads(self, stage: Stage, rows: slice) -> list[tuple[SampleStates, Rows]]:
        """Where the hoisted condition of a stage is to be read."""
        if self.modulations is None or not stage.modulation:
            return []
        return [(self.modulations.source.states[stage.name], compact(self.modulations.index[rows]))]

    def input_reads(self, position: int, rows: slice) -> list[tuple[SampleStates, Rows]]:
        """Where the kept or recomputed input of a block is to be read in the backward pass."""
        if position in self.recomputed:
            return [(self.recomputed[position], rows)]
        assert self.record is not None
        return [(self.record.states[position], compact([self.kept[row][1] for row in range(rows.start, rows.stop)]))]

    def put(self, position: int, rows: slice, values: Sequence[Tensor], staging: Staging, placement: Any) -> None:
        """The states of these samples after a stage: the next one's input, and the record's where it is kept."""
        record = self.record if self.record is not None and self.record.keeps(position) else None
        whole = record is not None and record.placement == placement and self._covers(record)
        if self._next is None:
            if record is not None and whole:
                self._next = record.at(position, values)
            else:
                self._next = staging.states(placement, self.size, specs(values))
        self._next.write(rows, values)
        if record is not None and not whole:
            for row, target in self.kept:
                if rows.start <= row < rows.stop:
                    part = slice(row - rows.start, row - rows.start + 1)
                    record.at(position, values).write(slice(target, target + 1), [value[part] for value in values])

    def advance(self) -> None:
        """All microbatches have passed the stage."""
        self.forget()
        self.carried, self._next = self._next, None

    def forget(self) -> None:
        """Drop the carried states, unless the record keeps them."""
        kept = self.record.states.values() if self.record is not None else ()
        if self.carried is not None and not any(self.carried is states for states in kept):
            self.carried.drop()
        self.carried = None

    def _covers(self, record: Record) -> bool:
        return record.rows == self.size and list(self.kept) == [(row, row) for row in range(self.size)]


def batch_size(inputs: Mapping[str, Any]) -> int:
    """B, of the first input with one row a sample."""
    for name, value in inputs.items():
        if is_batched(name, value):
            if value.shape[0] == 0:
                raise ValueError(f"{name} has shape {tuple(value.shape)}: give at least one row")
            return int(value.shape[0])
    raise ValueError(f"inputs {', '.join(inputs) or 'are empty'}: none has one row a sample; give tensors (B, ...)")


def _ordinary(value: Tensor) -> Tensor:
    """The tensor itself, or a copy where it was made in inference mode: no graph may save such a one."""
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def specs(values: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape of one sample, dtype) of each tensor (b, ...)."""
    return [(tuple(value.shape[1:]), value.dtype) for value in values]


def compact(index: Sequence[int]) -> Rows:
    """The rows `index` as a slice where they are consecutive: one copy instead of many."""
    first = index[0]
    if list(index) == list(range(first, first + len(index))):
        return slice(first, first + len(index))
    return list(index)


def home_of(inputs: Mapping[str, Any]) -> torch.device:
    """Where results go: the device of the first batched input."""
    return next(v.device for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 0)
