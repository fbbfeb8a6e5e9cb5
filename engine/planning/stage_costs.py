"""What one call of a stage takes on the device: counted by running it once on meta, one block of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from leapalign.engine.backbones import Backbone, Stage
from leapalign.engine.memory.store import Unit
from leapalign.engine.passes.backward import differentiate, leaves_of
from leapalign.engine.passes.evaluation import specs
from leapalign.engine.planning.counting import ALLOCATION, Counting, DeviceCounter, gpu_operators
from leapalign.engine.planning.replay import Replay
from leapalign.engine.planning.workload import Workload, example_inputs
from leapalign.engine.streaming.gradients import accumulation
from leapalign.engine.streaming.partition import modulation_unit, stages_of, units_of

Specs = tuple[tuple[tuple[int, ...], torch.dtype], ...]  # (shape of one row, dtype) of each tensor
_META = torch.device("meta")


@dataclass(frozen=True)
class Call:
    """One call of a stage.

    Attributes:
        device_bytes: the most alive at once, above its weights, inputs, cotangents and gradient sums.
        kept_bytes: of its result.
        flops: of matrix products and attention.
    """

    device_bytes: int
    kept_bytes: int
    flops: int


@dataclass(frozen=True, eq=False)
class Part:
    """A stage of the forward pass, and what is known of it.

    Attributes:
        kind: a number; equal for stages that cost the same.
        unit: of its weights.
        modulation: of its hoisted linears, if it has any.
        given: width of the condition that it takes; 0 for none.
        carried: of its input; none for the stem.
        leaving: of its output.
    """

    stage: Stage
    kind: int
    unit: Unit
    modulation: Unit | None
    given: int
    carried: Specs
    leaving: Specs


class StageCosts:
    """Costs of all stages of a model for one workload. Calls are counted when they are first asked for, then known.

    Attributes:
        parts: stem, blocks, head.
        kinds: the first part of each kind.
        counts: parts by kind.
        condition_unit: of the embedders behind temb; None where there are none.
        units: all, by name.
        width: D of temb.
        buffer_bytes: of the model's buffers, which stay on the device.
    """

    def __init__(self, backbone: Backbone, workload: Workload) -> None:
        """
        Args:
            backbone: on meta.

        Raises:
            ValueError: its device is another one, or the workload lacks inputs.
        """
        if backbone.device.type != "meta":
            raise ValueError(f"the backbone is on {backbone.device}: make one with device='meta' to plan with")
        self.backbone, self.workload, self.dtype = backbone, workload, workload.dtype
        units, unit_of = units_of(backbone)
        self.units = {unit.name: unit for unit in units}
        self.trainable = {name for name, parameter in backbone.module.named_parameters() if parameter.requires_grad}
        self.buffer_bytes = sum(rounded(each.numel() * each.element_size()) for each in backbone.module.buffers())
        self._known: dict[Any, Call] = {}
        self._recall = Replay()
        self._constants: dict[int, Any] = {}  # by rows
        self._inputs = example_inputs(backbone, workload, 1)
        self.input_specs = {name: (tuple(value.shape), value.dtype) for name, value in self._inputs.items()}
        self.hoisted = any(stage.modulation for stage in stages_of(backbone))
        condition = backbone.condition
        self.condition_unit = self.units[unit_of[condition.name]] if condition is not None else None
        with gpu_operators(), torch.no_grad():
            self.width = self._condition(self._condition_rows(1)).shape[1] if condition is not None else 0
            self.parts = self._walk(unit_of)
        first = {part.kind: part for part in reversed(self.parts)}
        self.kinds = tuple(first[kind] for kind in sorted(first))
        self.counts = Counter(part.kind for part in self.parts)

    def forward(self, part: Part, rows: int) -> Call:
        """A call without grad, its inputs on the device."""
        return self._counted(("forward", part.kind, rows), lambda: self._run_forward(part, rows))

    def backward(self, part: Part, rows: int, *, params: bool) -> Call:
        """Recomputation and derivatives of inputs, and with `params` of weights, added to their sums."""
        return self._counted(("backward", part.kind, rows, params), lambda: self._run_backward(part, rows, params))

    def constants(self) -> Call:
        """What blocks and head need besides; of one evaluation."""

        def run() -> tuple[Iterable[Tensor], Callable[[], Any]]:
            inputs = self._rows(1)
            return inputs.values(), lambda: self.backbone.constants(inputs)

        return self._counted("constants", run)

    def condition(self, rows: int) -> Call:
        """temb, and its activation where modulation is hoisted."""

        def run() -> tuple[Iterable[Tensor], Callable[[], Any]]:
            weights, given = self._weights(self.condition_unit), self._condition_rows(rows)
            return weights.values(), lambda: torch.nn.functional.silu(self._condition(given, weights))

        return self._counted(("condition", rows), run)

    def condition_backward(self, rows: int) -> Call:
        """Derivatives of the embedders' weights."""

        def run() -> tuple[Iterable[Tensor], Callable[[], Any]]:
            weights, given = self._weights(self.condition_unit), self._condition_rows(rows)
            sums = self._sums(weights)
            cotangent = torch.empty(rows, self.width, dtype=accumulation(self.dtype), device=_META)

            def work() -> None:
                leaves = leaves_of(weights, sums)
                with torch.enable_grad():
                    output = torch.nn.functional.silu(self._condition(given, leaves).to(cotangent.dtype))
                differentiate([output], [], leaves, sums, [cotangent])

            return [*weights.values(), *sums.values(), cotangent], work

        return self._counted(("condition backward", rows), run)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _walk(self, unit_of: Mapping[str, str]) -> tuple[Part, ...]:
        backbone, parts = self.backbone, []
        carried: Specs = ()
        numbers: dict[Any, int] = {}
        outputs: dict[int, Specs] = {}
        stages = [backbone.stem, *backbone.blocks, backbone.head]
        for position, stage in enumerate(stages, -1):
            unit = self.units[unit_of[stage.name]]
            hoisted = self.units.get(modulation_unit(stage)) if stage.modulation else None
            if hoisted is not None:
                given = sum(hoisted.shapes[f"{linear}.weight"][0] for linear in stage.modulation)
            else:
                given = self.width if position >= 0 and not self.hoisted else 0
            prefix = f"{stage.name}."
            weights = tuple((name.removeprefix(prefix), tuple(unit.shapes[name])) for name in stage.parameters)
            ends = position if position in (-1, len(stages) - 3, len(stages) - 2) else 0  # the last block may differ
            trained = frozenset(name.removeprefix(prefix) for name in self.trainable.intersection(stage.parameters))
            kind = numbers.setdefault((ends, weights, given, carried, trained), len(numbers))
            part = Part(stage, kind, unit, hoisted, given, carried, ())
            if kind not in outputs:
                _, work = self._run_forward(part, 1)
                value = work()
                outputs[kind] = tuple(specs((value,) if isinstance(value, Tensor) else tuple(value)))
            parts.append(Part(stage, kind, unit, hoisted, given, carried, outputs[kind]))
            carried = outputs[kind]
        return tuple(parts)

    def _counted(self, key: Any, prepare: Callable[[], tuple[Iterable[Tensor], Callable[[], Any]]]) -> Call:
        if key not in self._known:
            counter = DeviceCounter()
            with gpu_operators():
                held, work = prepare()
                held = list(held)
                with self._recall, Counting(counter), torch.no_grad():
                    counter.hold(held, None)
                    before = counter.current
                    result = work()
                    kept = counter.current
                    del result
            before = counter.current  # with the model's buffers that it read
            self._known[key] = Call(counter.peak - before, kept - before, counter.flops)
        return self._known[key]

    def _run_forward(self, part: Part, rows: int) -> tuple[Iterable[Tensor], Callable[[], Any]]:
        weights = self._weights(part.unit)
        if not part.carried:
            return weights.values(), lambda: part.stage.run(weights, self._rows(rows))
        carried, given, constants = self._arguments(part, rows)
        held = [*weights.values(), *carried, *([given] if given is not None else []), *_tensors(constants)]
        return held, lambda: part.stage.run(weights, carried, given, constants)

    def _run_backward(self, part: Part, rows: int, params: bool) -> tuple[Iterable[Tensor], Callable[[], Any]]:
        weights = self._weights(part.unit)
        sums = self._sums(weights) if params else {}
        cotangents = [_empty(spec, rows) for spec in part.leaving]
        if not part.carried:
            wanted = [] if params else ["hidden_states"]

            def stem() -> None:
                leaves = leaves_of(weights, sums)
                inputs = self._rows(rows)
                inputs |= {name: inputs[name].detach().requires_grad_() for name in wanted if name in inputs}
                with torch.enable_grad():
                    outputs = tuple(part.stage.run(leaves, inputs))
                differentiate(outputs, [inputs[name] for name in wanted if name in inputs], leaves, sums, cotangents)

            return [*weights.values(), *sums.values(), *cotangents], stem
        carried, given, constants = self._arguments(part, rows)

        def block() -> None:
            leaves = leaves_of(weights, sums)
            inputs = [value.detach().requires_grad_() for value in carried]
            condition = None if given is None else given.detach().requires_grad_(params)
            with torch.enable_grad():
                output = part.stage.run(leaves, tuple(inputs), condition, constants)
            outputs = (output,) if isinstance(output, Tensor) else tuple(output)
            targets = [*inputs, *([condition] if condition is not None and params else [])]
            found = differentiate(outputs, targets, leaves, sums, cotangents)
            del output, outputs, found

        held = [*weights.values(), *sums.values(), *cotangents, *carried, *_tensors(constants)]
        return [*held, *([given] if given is not None else [])], block

    def _arguments(self, part: Part, rows: int) -> tuple[tuple[Tensor, ...], Tensor | None, Any]:
        if rows not in self._constants:
            inputs = self._rows(rows)
            self._constants[rows] = self.backbone.microbatch_constants(self.backbone.constants(inputs), inputs)
        constants = self._constants[rows]
        given = torch.empty(rows, part.given, dtype=self.dtype, device=_META) if part.given else None
        return tuple(_empty(spec, rows) for spec in part.carried), given, constants

    def _condition_rows(self, rows: int) -> dict[str, Any]:
        names = self.backbone.condition_inputs
        return {name: value for name, value in self._rows(rows).items() if name in names}

    def _condition(self, given: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        stage = self.backbone.condition
        assert stage is not None
        result: Tensor = stage.run(weights or self._weights(self.condition_unit), given)
        return result

    def _rows(self, rows: int) -> dict[str, Any]:
        return example_inputs(self.backbone, self.workload, rows)

    def _weights(self, unit: Unit | None) -> dict[str, Tensor]:
        assert unit is not None
        return {name: torch.empty(shape, dtype=self.dtype, device=_META) for name, shape in unit.shapes.items()}

    def _sums(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = accumulation(self.dtype)
        return {name: torch.empty_like(each, dtype=dtype) for name, each in weights.items() if name in self.trainable}


def rounded(count: int) -> int:
    """Bytes that the device's allocator takes for so many."""
    return -(-count // ALLOCATION) * ALLOCATION


def state_bytes(specs: Specs, rows: int) -> int:
    """Bytes of states (rows, *shape) of each spec."""
    return sum(rounded(rows * prod(shape) * dtype.itemsize) for shape, dtype in specs)


def _empty(spec: tuple[Sequence[int], torch.dtype], rows: int) -> Tensor:
    return torch.empty(rows, *spec[0], dtype=spec[1], device=_META)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, tuple | list) else []
