"""A transformer whose weights live in host memory and visit the device one block at a time."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leapalign.engine.backbones import Backbone, backbone_of
from leapalign.engine.ledger import Ledger
from leapalign.engine.memory.arena import HostArena
from leapalign.engine.memory.checkpoint import model_files
from leapalign.engine.memory.store import BlockStore
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.passes.autograd import EvaluationNode, count_steps
from leapalign.engine.passes.backward import Backward, check_input_grads
from leapalign.engine.passes.evaluation import Evaluation, Leg, ModulationRows, Modulations, Record, batch_size, home_of
from leapalign.engine.passes.forward import Parts, forward
from leapalign.engine.passes.held_sums import HeldSums
from leapalign.engine.passes.hoisting import HoistedBackward, hoist
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.activations import STAGING_SLOTS, Staging
from leapalign.engine.streaming.gradients import Gradients, Sink
from leapalign.engine.streaming.partition import (
    adopt,
    fill_buffers,
    meta_transformer,
    one_dtype,
    resident_units,
    stages_of,
    units_of,
)
from leapalign.engine.streaming.streamer import Streamer
from leapalign.engine.streaming.weights import Weights
from leapalign.engine.wrapper import Wrapper

__all__ = ["Leg", "ModulationRows", "Modulations", "Record", "StreamedModel"]

_OWNER = "_streamed_by"  # attribute of the wrapped module: a weak reference to its StreamedModel


class StreamedModel(Wrapper):
    """A drop-in for a diffusers transformer that keeps nothing model-sized on the device.

    The wrapped module's parameters become views of one host allocation; they stay the same objects under the same
    names, so an optimizer on the host, `state_dict` and `save_pretrained` work as before. Everything that is not
    defined here is the wrapped module's (`config`, `dtype`, ...). Dropout is off.

    Called like the transformer it returns what the transformer returns. In grad mode the output carries one autograd
    node: `loss(model(...)).backward()` leaves gradients in `parameter.grad`, on the host and in the parameter's dtype,
    and input gradients where inputs require them. Hooks on parameters are not called. The memory of `grad` is the
    store's: after `zero_grad()` the next backward pass writes there, so clone a gradient that is to outlive it.

    Gradients that wait on the host between products are `sums`. What a step really takes is in `ledger`.

    A trainer that knows its cotangents uses `evaluate`, `vjp` and `hoist` instead, which also choose what is kept.
    """

    def __init__(
        self,
        transformer: nn.Module | Backbone,
        plan: MemoryPlan | None = None,
        optimizer: AdamW8bit | None = None,
        *,
        device: torch.device | str | None = None,
        delay: Callable[[str], float] | None = None,
        arena: Callable[[Mapping[str, int]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """
        Args:
            transformer: FluxTransformer2DModel, SD3Transformer2DModel, or a `SequentialBackbone` around any model. Its
                weights are moved to host memory, all of one floating dtype.
            plan: what is where; by default everything is streamed.
            optimizer: takes this model's parameters, and is then `model.optimizer`.
            device: where blocks are computed; None: the GPU if there is one, else the CPU. A backbone brings its own.
            delay: seconds by which host threads delay each copy, for tests of the order.
            arena: makes the host memory; by default a HostArena, pinned if the device is a GPU.

        Raises:
            ValueError: a model of another kind, of several dtypes, or one that is streamed already.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        plan = plan or MemoryPlan()
        if isinstance(transformer, nn.Module):
            backbone = backbone_of(
                transformer, hoist=plan.hoist, device=device, kernels=plan.kernels, attention=plan.attention
            )
        else:
            backbone, device = transformer, transformer.device
        module = backbone.module
        super().__init__(module)
        owner = module.__dict__.get(_OWNER, lambda: None)()
        if owner is not None and owner._unhook.alive:
            raise ValueError(f"this {type(module).__name__} is streamed already: close() the other StreamedModel first")
        module.__dict__[_OWNER] = weakref.ref(self)
        self.plan, self.device, self.backbone = plan, device, backbone
        self.ledger = Ledger(device, plan)
        self.timestep_scale = backbone.timestep_scale
        units, unit_of = units_of(backbone)
        pinned = functools.partial(HostArena, pin=device.type == "cuda")
        self.store = BlockStore(units, one_dtype(module), arena=arena or pinned)
        self._parameters_of_unit = adopt(module, self.store)
        self._memory_of_unit = {name: self.store.region(name) for name in self.store.units}
        self._streamer = Streamer(device, delay=delay)
        resident = resident_units(backbone, plan, unit_of)
        self._changes = 0
        self._unhook = weakref.finalize(self, count_steps(self))
        weights = Weights(self.store, self._streamer, resident=resident, slots=plan.slots, version=self._unit_version)
        largest = max(unit.numel for unit in units)
        self._parts = Parts(
            backbone=backbone,
            plan=plan,
            store=self.store,
            weights=weights,
            gradients=Gradients(self.store, self._streamer, weights, largest),
            staging=Staging(self._streamer, slots=STAGING_SLOTS),
            device=device,
            unit_of=unit_of,
            trainable=self._trainable,
        )
        self.sums = HeldSums(self._parts)
        self._load: Callable[[], None] | None = None
        self.optimizer = optimizer
        if optimizer is not None:
            optimizer.bind(self)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        plan: MemoryPlan | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> StreamedModel:
        """Read a transformer folder of a diffusers pipeline; its weights go straight into the host arena.

        Args:
            folder: holds config.json and safetensors files, in shards or not.
            dtype: of the weights in memory.

        Raises:
            ValueError: no such folder, another class of model, or files that do not belong to it.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json: name the transformer folder of a diffusers pipeline")
        files = model_files(folder)
        if not files:
            raise ValueError(f"{folder} has no diffusion_pytorch_model*.safetensors: download or convert the weights")
        module = meta_transformer(folder, dtype)
        buffers = fill_buffers(module, files)  # before the stages are made: they take copies
        model = cls(module, plan, device=device)
        model._load = functools.partial(model.store.load, files, buffers=buffers)
        model._load()
        return model

    def reload(self) -> None:
        """Read the weights from the files of `from_pretrained` once more.

        Raises:
            ValueError: the model was not made from files.
        """
        if self._load is None:
            raise ValueError("this StreamedModel was not read from files: there is nothing to read again")
        self._load()
        for unit in self.store.units:
            self.weights_changed(unit)

    # ---- the transformer's own call --------------------------------------------------------------------------------

    def forward(self, *arguments: Any, return_dict: bool = True, **inputs: Any) -> Any:
        """The transformer's forward; see the class.

        Args:
            arguments: in the order of the transformer's own forward.
            return_dict: as in diffusers: an output object with `sample`, or a tuple. The result of a
                `SequentialBackbone`'s head is returned as it is.
            inputs: tensors on any device; the result is on that of the first one with one row a sample.

        Raises:
            ValueError: an argument that the streamed model does not support; the message names it.
        """
        if arguments:
            named = inspect.signature(self.module.forward).bind_partial(*arguments).arguments
            if named.keys() & inputs.keys():
                raise TypeError(f"{min(named.keys() & inputs.keys())} is given twice, by its place and by its name")
            return_dict = bool(named.pop("return_dict", return_dict))
            inputs = {**named, **inputs}
        given = self.backbone.check_inputs(inputs)
        output: Tensor
        if torch.is_grad_enabled():
            names = [name for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad]
            trains = any(parameter.requires_grad for parameter in self.parameters())
            if names or trains:
                anchor = torch.zeros((), requires_grad=trains)  # makes a node even if no input requires grad
                output = EvaluationNode.apply(anchor, self, given, tuple(names), *(given[name] for name in names))
            else:
                output = self.evaluate(given)
        else:
            output = self.evaluate(given)
        return self.backbone.output(output, return_dict)

    # ---- evaluations and products ----------------------------------------------------------------------------------

    def hoist(self, inputs: Mapping[str, Tensor]) -> Modulations | None:
        """Modulation vectors of all blocks for N rows, e.g. every sample at every noise level of a step.

        Valid while the weights do not change, which is checked. None if there is nothing to hoist.

        Args:
            inputs: the inputs that modulation depends on, N rows each (FLUX: timestep, pooled_projections, guidance);
                others are ignored.
        """
        if self.backbone.condition is None or not any(stage.modulation for stage in stages_of(self.backbone)):
            return None
        given = {name: inputs[name] for name in self.backbone.condition_inputs if inputs.get(name) is not None}
        missing = [name for name in self.backbone.condition_inputs if name not in given]
        if missing:
            raise ValueError(f"hoist: {missing[0]} is missing; give {', '.join(self.backbone.condition_inputs)}")
        try:
            with self._own_dtype():
                result = hoist(self._parts, given)
        finally:
            self._parts.weights.settle()
        result.version = self.weights_version()
        return result

    @torch.no_grad()
    def evaluate(
        self,
        inputs: Mapping[str, Any],
        *,
        modulations: ModulationRows | None = None,
        record: Record | None = None,
        record_rows: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """The output (B, ...) without grad, on the device of the first batched input.

        Args:
            inputs: the transformer's keyword arguments for B samples.
            modulations: the samples' rows of `hoist`; None: evaluated here, which streams the modulation weights.
            record: keeps block inputs of some of the samples.
            record_rows: (row of this batch, row of the record) of those samples.

        Raises:
            ValueError: inputs that the model does not support, or modulations or a record of other weights.
        """
        if record is not None and record.version is not None:
            self._check_version(record, "the record's block inputs")
        with self._own_dtype():
            evaluation = self._evaluation(inputs, modulations, record, record_rows)
            if record is not None:
                record.version = self.weights_version()
            try:
                (output,) = forward(self._parts, [evaluation])
            finally:
                self._release(evaluation, modulations)
                self._parts.weights.settle()  # from here on the host may change them
        return output.to(home_of(inputs))

    def record(self, rows: int) -> Record:
        """An empty record for the block inputs of `rows` samples, where the plan places it."""
        plan = self.plan
        return Record(self._parts.staging, plan.block_inputs, rows, plan.every, len(self.backbone.blocks))

    def vjp(
        self,
        legs: Sequence[Leg],
        *,
        params: Literal["none", "accumulate", "deliver"] = "none",
        sink: Sink | None = None,
    ) -> list[dict[str, Tensor]]:
        """Vector-Jacobian products (dv/dtheta)^T c, summed over the legs, and (dv/dinput)^T c of each leg.

        All legs go through a block together, while its weights are on the device.

        Args:
            params: "none": input gradients only. "accumulate": weight gradients are added to sums held on the host in
                the weights' dtype (modulation linears: as factors). "deliver": each unit's finished gradient, the held
                sum included, goes to the sink, which may then change the unit's weights.
            sink: for "deliver".

        Returns:
            For each leg {name: gradient} of its `input_grads`, in the input's dtype, on the cotangent's device.

        Raises:
            ValueError: a sink without "deliver", or "deliver" without a sink; no legs; `input_grads` that name no
                floating input; modulations or a record of other weights.
        """
        if (params == "deliver") != (sink is not None):
            raise ValueError(f"params={params!r} with sink={sink!r}: give a sink for 'deliver', and only then")
        return self.products(legs, params, "held", sink)

    def refresh(self) -> None:
        """Take the host's weights anew. Needed after changes that torch does not count: through `.data`, or numpy.

        Operations on the parameters themselves and steps of torch optimizers are noticed without it.
        """
        self._changes += 1

    def release_resident(self) -> None:
        """Take weights, slots and buffers off the device, e.g. while a reward needs it; the next use brings them back.

        States that the plan places on the device stay.
        """
        self._parts.weights.release()
        self._parts.gradients.release()
        self._parts.staging.release()

    @property
    def fused_optimizer(self) -> AdamW8bit | None:
        """The optimizer, if it updates inside the backward pass."""
        return self.optimizer if self.optimizer is not None and self.optimizer.fused_backward else None

    @property
    def streamer(self) -> Streamer:
        """The owner of all copies."""
        return self._streamer

    @property
    def weights(self) -> Weights:
        """The slots through which units are streamed."""
        return self._parts.weights

    @property
    def gradients(self) -> Gradients:
        """The sums of weight gradients, and what delivers them."""
        return self._parts.gradients

    def weights_changed(self, unit: str) -> None:
        """The unit's weights on the host are new, by a write that torch did not count."""
        torch.autograd.graph.increment_version(self._parameters_of_unit[unit])

    def close(self) -> None:
        """End the copy threads and free device memory. The wrapped module goes on working on the host."""
        self._unhook()
        self._streamer.close()

    def products(self, legs: Sequence[Leg], params: str, kind: str, sink: Sink | None) -> list[dict[str, Tensor]]:
        """`vjp` with weight gradients summed under a kind's name in the store ("held"; "grad": `parameter.grad`)."""
        # In inference mode nothing has a gradient, whatever enable_grad() says.
        with torch.inference_mode(False), torch.no_grad(), self._own_dtype():
            return self._products(legs, params, kind, sink)

    def _products(self, legs: Sequence[Leg], params: str, kind: str, sink: Sink | None) -> list[dict[str, Tensor]]:
        parts = self._parts
        self._check_legs(legs)
        fresh = [leg for leg in legs if leg.record is None]
        evaluations: list[Evaluation] = []
        try:
            for leg in legs:
                evaluations.append(self._evaluation_of(leg))
            if fresh:
                forward(parts, [e for leg, e in zip(legs, evaluations, strict=True) if leg.record is None], head=False)
            for leg, evaluation in zip(legs, evaluations, strict=True):
                if leg.record is None:  # complete now
                    leg.record, leg.record_rows = evaluation.record, None
            backward = Backward(parts, list(zip(legs, evaluations, strict=True)), params, kind, sink)
            found = backward.run()
            HoistedBackward(backward, self.sums.factors).run()
            if params == "deliver" and sink is not None:
                self._deliver_unused(backward, sink)
            parts.gradients.flush()
        finally:
            parts.gradients.cancel()
            for leg, evaluation in zip(legs, evaluations, strict=False):
                self._release(evaluation, leg.modulations)
            parts.weights.settle()  # from here on the host may change them, and read what was carried
            parts.gradients.settle(kind)
        return found

    def _check_legs(self, legs: Sequence[Leg]) -> None:
        check_input_grads(legs)
        for leg in legs:
            if leg.record is not None:
                self._check_version(leg.record, "the record's block inputs")

    def _evaluation_of(self, leg: Leg) -> Evaluation:
        """A leg's evaluation, with a new record to be filled if the leg has none."""
        size = batch_size(leg.inputs)
        record, rows = leg.record, leg.record_rows
        if record is None:
            record, rows = self.record(size), None
            record.version = self.weights_version()
        kept = list(enumerate(range(size) if rows is None else rows))
        return self._evaluation(leg.inputs, leg.modulations, record, kept)

    def _check_version(self, made: Modulations | Record, what: str) -> None:
        if made.version != self.weights_version():
            state = (
                "are not there (any more)" if made.version is None else "belong to other weights than the present ones"
            )
            raise ValueError(f"{what} {state}: evaluate again")

    def _deliver_unused(self, backward: Backward, sink: Sink) -> None:
        """Zero gradients of the parameters that no stage uses."""
        for unit in self.store.units:
            if unit not in backward.left and (names := self._trainable(unit)):
                with self._parts.gradients.sum(unit, carry="held"):
                    pass
                self._parts.gradients.deliver(unit, names, sink)

    def _evaluation(
        self,
        inputs: Mapping[str, Any],
        modulations: ModulationRows | None,
        record: Record | None,
        kept: Sequence[tuple[int, int]],
    ) -> Evaluation:
        given = self.backbone.check_inputs(inputs)
        size = batch_size(given)
        if modulations is None:
            own = self.hoist(given)
            modulations = own.rows(range(size)) if own is not None else None
        else:
            self._check_version(modulations.source, "the modulations")
        constants = self.backbone.constants(given)
        return Evaluation(given, size, constants, self.plan.microbatch, modulations, record=record, kept=kept)

    def _own_dtype(self) -> AbstractContextManager[Any]:
        """Autocast off: blocks are recomputed in the backward pass, which must be the same arithmetic."""
        return nullcontext() if self.device.type == "meta" else torch.autocast(self.device.type, enabled=False)

    @staticmethod
    def _release(evaluation: Evaluation, given: ModulationRows | None) -> None:
        """Give back the modulations that were made for one evaluation alone."""
        if given is None and evaluation.modulations is not None:
            evaluation.modulations.source.drop()

    def _trainable(self, unit: str) -> tuple[str, ...]:
        names = self.store.units[unit].shapes
        parameters = self._parameters_of_unit[unit]
        return tuple(name for name, parameter in zip(names, parameters, strict=True) if parameter.requires_grad)

    def _unit_version(self, unit: str) -> int:
        # The store's memory counts for itself: `store.load` and `store.parameters()` write there.
        changes = self._changes + self._memory_of_unit[unit]._version
        return changes + sum(parameter._version for parameter in self._parameters_of_unit[unit])

    def weights_version(self) -> int:
        """Grows with every in-place change of any weight, optimizers' updates included."""
        return sum(self._unit_version(unit) for unit in self.store.units)
