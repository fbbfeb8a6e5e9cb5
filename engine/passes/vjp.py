"""Vector-Jacobian products of the velocity with known cotangents: the only place the transformer is differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.velocity import microbatches, select, timestep_scale, velocity


def velocity_vjp(
    transformer: nn.Module,
    latents: Tensor,
    sigma: Tensor,
    conditioning: Mapping[str, Any],
    cotangent: Tensor,
    *,
    grads: dict[str, Tensor] | None,
    input_grad: bool,
    microbatch: int | None = None,
) -> Tensor | None:
    """(dv/dtheta)^T c into `grads`, and (dv/dx)^T c as the result, with v = v_theta(latents, sigma).

    One graph lives at a time: that of one microbatch. Parameters' `.grad` and `requires_grad` are not touched, and
    gradient checkpointing is the transformer's own setting.

    Args:
        latents: (B, ...) float32 or float64.
        sigma: (B,) or () in the latents' dtype.
        conditioning: the transformer's keyword arguments for these B rows.
        cotangent: (B, ...) c, the gradient arriving at v, in the latents' dtype.
        grads: {parameter name: tensor} to add to. Missing entries of trainable parameters are created: float32, or
            float64 for float64 parameters, zero where v does not depend on the parameter. None: no weight gradient.
        input_grad: whether (dv/dx)^T c is wanted.
        microbatch: rows a graph; None for all of them.

    Returns:
        (B, ...) in the latents' dtype, or None without `input_grad`.
    """
    weights = {} if grads is None else trainable(transformer)
    if grads is not None:
        ensure_grads(grads, weights)
    u = torch.zeros_like(latents) if input_grad else None
    if not weights and not input_grad:
        return None
    scale = timestep_scale(transformer)
    sigma = sigma.expand(latents.shape[0])
    for rows in microbatches(latents.shape[0], microbatch):
        with torch.enable_grad():
            x = latents[rows].detach().requires_grad_(input_grad)
            v = velocity(transformer, x, sigma[rows], select(conditioning, rows), scale=scale)
        targets = [*weights.values(), *([x] if input_grad else [])]
        found: list[Tensor | None] = list(torch.autograd.grad(v, targets, cotangent[rows], allow_unused=True))
        del v  # the graph's last holder
        if u is not None:
            dx = found.pop()
            if dx is not None:
                u[rows] = dx
        if grads is not None:
            _add(grads, weights, found)
    return u


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of what requires a gradient; a tied parameter appears once, under its first name."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def ensure_grads(grads: dict[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Create the missing entries of `grads` as zeros: float64 for float64 parameters, else float32.

    bfloat16 would lose the sum over legs, microbatches and accumulation steps.
    """
    for name, parameter in weights.items():
        if name not in grads:
            grads[name] = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _add(grads: dict[str, Tensor], weights: Mapping[str, Tensor], found: list[Tensor | None]) -> None:
    """grads += found, releasing each found gradient as soon as it is added."""
    for name in reversed(list(weights)):
        gradient = found.pop()
        if gradient is not None:  # None: v does not depend on it, e.g. the last block's context branch
            grads[name].add_(gradient)
