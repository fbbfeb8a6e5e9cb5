"""A streamed evaluation as one node of somebody else's autograd graph, and `parameter.grad` in the store."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from leapalign.engine.passes.evaluation import Leg, batch_size
from leapalign.engine.passes.protocols import Fused, Streamed

GRAD = "grad"  # the store's kind whose regions are the parameters' `grad`


class EvaluationNode(torch.autograd.Function):
    """forward evaluates and keeps the block inputs; backward runs the streamed product with the arriving gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, model: Streamed, inputs: dict[str, Any], names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        """
        Args:
            anchor: () requires grad if a weight does, so that there is a node even if no input requires grad.
            inputs: the model's keyword arguments.
            names: of the inputs that require grad.
            tensors: those inputs, for autograd to see.
        """
        inputs = {name: value.detach() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        rows = range(batch_size(inputs))
        hoisted = model.hoist(inputs)
        ctx.modulations = hoisted.rows(rows) if hoisted is not None else None
        ctx.record = model.record(len(rows))
        ctx.model, ctx.names, ctx.version = model, names, model.weights_version()
        # Saved as by any node: autograd then refuses a second pass over a freed graph, and inputs changed in place.
        ctx.save_for_backward(*(value for value in inputs.values() if isinstance(value, Tensor)))
        ctx.inputs = {name: None if isinstance(value, Tensor) else value for name, value in inputs.items()}
        kept = [(row, row) for row in rows]
        return model.evaluate(inputs, modulations=ctx.modulations, record=ctx.record, record_rows=kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        model: Streamed = ctx.model
        saved = iter(ctx.saved_tensors)
        inputs = {name: next(saved) if value is None else value for name, value in ctx.inputs.items()}
        if model.weights_version() != ctx.version:
            raise RuntimeError(
                "the weights of the streamed model have changed between forward and backward: call backward before the "
                "optimizer's step"
            )
        leg = Leg(inputs, cotangent, ctx.names, modulations=ctx.modulations, record=ctx.record)
        anchor = ctx.next_functions[0][0]
        # autograd.grad(loss, input) and backward(inputs=...) must leave `parameter.grad` alone.
        if anchor is not None and torch._C._will_engine_execute_node(anchor):
            optimizer = model.fused_optimizer
            found = _add_to_grad(model, leg) if optimizer is None else _update(model, optimizer, leg)
        else:
            (found,) = model.vjp([leg])
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.record.drop()  # the caller may hold the loss, and so this node, until the next step
            if ctx.modulations is not None:
                ctx.modulations.source.drop()
        return None, None, None, None, *(found[name].to(inputs[name].device) for name in ctx.names)


def _update(model: Streamed, optimizer: Fused, leg: Leg) -> dict[str, Tensor]:
    """Update every unit by the weight gradients of one leg as they are finished; returns its input gradients."""
    with optimizer.fused() as sink:
        (found,) = model.vjp([leg], params="deliver", sink=sink)
    return found


def _add_to_grad(model: Streamed, leg: Leg) -> dict[str, Tensor]:
    """Add the weight gradients of one leg to `parameter.grad`; returns its input gradients."""
    adopt_grads(model)
    (found,) = model.products([leg], "accumulate", GRAD, None)
    parameters = dict(model.named_parameters())
    for unit in model.sums.units(GRAD):
        for name, view in model.store.views(unit, GRAD).items():
            if parameters[name].requires_grad:
                parameters[name].grad = view
    return found


def adopt_grads(model: Streamed) -> None:
    """Make the store's "grad" regions say what the parameters say.

    They are the memory of every `grad` that a backward pass made; but after `zero_grad()` there is none, and somebody
    may have put a tensor of their own there.
    """
    store = model.store
    store.allocate(GRAD, store.dtype)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    filled = model.sums.units(GRAD)
    for unit in store.units:
        views = store.views(unit, GRAD)
        filled.discard(unit)
        if not any(name in trained and trained[name].grad is not None for name in views):
            continue
        filled.add(unit)
        for name, view in views.items():
            gradient = trained[name].grad if name in trained else None
            if gradient is None:
                view.zero_()
            elif gradient.data_ptr() != view.data_ptr():
                view.copy_(gradient)


def count_steps(model: Streamed) -> Callable[[], None]:
    """Refresh the model after every step of an optimizer that has one of its parameters; returns what ends that.

    The fused optimizers change weights without their version counters.
    """
    ours = {id(parameter) for parameter in model.module.parameters()}
    reference = weakref.ref(model)

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        streamed = reference()
        if streamed is not None and any(
            id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]
        ):
            streamed.refresh()

    return register_optimizer_step_post_hook(stepped).remove
