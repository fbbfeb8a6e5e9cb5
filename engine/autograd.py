"""A streamed evaluation as one node of somebody else's autograd graph, and `parameter.grad` in the store."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from leapalign.engine.evaluation import Leg, batch_size

if TYPE_CHECKING:
    from leapalign.engine.streamed import StreamedModel

GRAD = "grad"  # the store's kind whose regions are the parameters' `grad`


class EvaluationNode(torch.autograd.Function):
    """forward evaluates and keeps the block inputs; backward runs the streamed product with the arriving gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, model: StreamedModel, inputs: dict[str, Any], names: tuple[str, ...], *tensors: Tensor
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
        ctx.model, ctx.inputs, ctx.names, ctx.version = model, inputs, names, model.weights_version()
        kept = [(row, row) for row in rows]
        return model.evaluate(inputs, modulations=ctx.modulations, record=ctx.record, record_rows=kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        model: StreamedModel = ctx.model
        if model.weights_version() != ctx.version:
            raise RuntimeError(
                "the weights of the streamed model have changed between forward and backward: call backward before the "
                "optimizer's step"
            )
        leg = Leg(ctx.inputs, cotangent, ctx.names, modulations=ctx.modulations, record=ctx.record)
        if any(parameter.requires_grad for parameter in model.parameters()):
            found = _add_to_grad(model, leg)
        else:
            (found,) = model.vjp([leg])
        return None, None, None, None, *(found[name] for name in ctx.names)


def _add_to_grad(model: StreamedModel, leg: Leg) -> dict[str, Tensor]:
    """Add the weight gradients of one leg to `parameter.grad`; returns its input gradients.

    The store's regions are the memory of every `grad`, so what stands there when a pass begins must be what the
    parameters say: nothing after `zero_grad()`, or somebody else's tensor.
    """
    store = model.store
    store.allocate(GRAD, store.dtype)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    filled = model.gradient_sums(GRAD)
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
    (found,) = model.products([leg], "accumulate", GRAD, None)
    for unit in filled:
        for name, view in store.views(unit, GRAD).items():
            if name in trained:
                trained[name].grad = view
    return found


def count_steps(model: StreamedModel) -> Callable[[], None]:
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
