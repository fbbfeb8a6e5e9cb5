"""Backpropagation through a rollout in one autograd graph: the methods that the engine's memory is compared with.

They are plain diffusers and autograd, as a trainer would be written without the engine: weights, their gradients and
the graph are all on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leapalign.engine.backbones.velocity import velocity
from leapalign.executors.reference import connect, discount, leap

# Nothing here draws random numbers, so that no state of a generator has to be kept with a checkpoint.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def checkpoint_blocks(transformer: nn.Module) -> None:
    """Keep the inputs of the blocks instead of their activations: diffusers' own switch."""

    def run(block: nn.Module, *arguments: Any) -> Any:
        return _checkpoint(block.__call__, *arguments)

    switch: Any = transformer
    switch.enable_gradient_checkpointing(run)


def backpropagate_steps(
    transformer: nn.Module,
    conditioning: Mapping[str, Any],
    latents: Tensor,
    sigmas: Tensor,
    g: Tensor,
    *,
    checkpoint_steps: bool = False,
) -> None:
    """Run n Euler steps in one graph and add dL/dtheta to every parameter's `grad`.

    Args:
        latents: (B, ...) float32 or float64, before the first of these steps.
        sigmas: (n + 1,) noise levels, in the latents' dtype.
        g: (B, ...) dL/dx after the last step.
        checkpoint_steps: keep only the latents between the steps, and recompute each step as a whole.
    """

    def step(x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return x + (after - before) * velocity(transformer, x, before, conditioning)

    run: Callable[..., Tensor] = partial(_checkpoint, step) if checkpoint_steps else step
    with torch.enable_grad():
        for i in range(len(sigmas) - 1):
            latents = run(latents, sigmas[i], sigmas[i + 1])
        latents.backward(g)


def backpropagate_leaps(
    transformer: nn.Module, conditioning: Mapping[str, Any], latents: Tensor, sigmas: Tensor, g: Tensor, *, alpha: float
) -> None:
    """LeapAlign's two leaps in one graph (Algorithm 1 of arXiv 2604.15311), added to every parameter's `grad`.

    Args:
        latents: (3, B, ...) x_k, x_j and x_0 of the rollout.
        sigmas: (3,) k > j > 0.
        g: (B, ...) dL/dx_0.
        alpha: the discount of the second leap's input.
    """
    x_k, real_j, real_0 = latents
    k, j = sigmas[0], sigmas[1]
    with torch.enable_grad():
        x_j = connect(leap(x_k, _each(k - j, g), velocity(transformer, x_k, k, conditioning)), real_j)
        v_j = velocity(transformer, discount(x_j, alpha), j, conditioning)
        x_0 = connect(leap(x_j, _each(j, g), v_j), real_0)
        x_0.backward(g)


def _each(width: Tensor, g: Tensor) -> Tensor:
    return width.expand(g.shape[0])
