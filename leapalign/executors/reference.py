"""Algorithm 1 of the paper, literally: two leaps and the reward in one autograd graph. The oracle of every executor.

It evaluates the leaps itself, with grad, and shares only the rollout's latents with the decoupled executor. Its memory
is that of both model evaluations and the reward at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.velocity import evaluation_mode, velocity
from leapalign.engine.passes.vjp import trainable
from leapalign.method.leapalign import LeapAlign
from leapalign.method.reward_gradient import check_finite, hinge, score
from leapalign.method.task import GradientResult, GradientTask, Reward, timed
from leapalign.method.trajectory import Trajectory, rollout


class Reference:
    """Gradients of the paper's own graph; an oracle for small models."""

    delivers = False
    streams = False

    def __call__(self, task: GradientTask, /) -> GradientResult:
        """Roll out, then backpropagate through both leaps and the reward at once.

        Raises:
            ValueError: a method other than LeapAlign with two leaps, whose algorithm this is.
        """
        if not isinstance(task.method, LeapAlign):
            raise ValueError(
                f"method {type(task.method).__name__} does not run in executor='reference', which is LeapAlign's "
                "Algorithm 1 written out; use autograd or streamed"
            )
        seconds: dict[str, float] = {}
        with evaluation_mode(task.transformer):
            with timed(seconds, "rollout", task.noise.device):
                trajectory = rollout(
                    task.transformer, task.conditioning, task.noise, task.sigmas,
                    keep=task.steps, microbatch=task.microbatch,
                )  # fmt: skip
            with timed(seconds, "graph", task.noise.device):
                found = reference_gradients(
                    task.transformer, task.conditioning, trajectory, task.reward, task.method, task.steps, seconds
                )
        return replace(found, grads={name: gradient * task.scale for name, gradient in found.grads.items()})


reference = Reference()


def reference_gradients(
    transformer: nn.Module,
    conditioning: Mapping[str, Any],
    trajectory: Trajectory,
    reward: Reward,
    method: LeapAlign,
    pairs: Tensor,
    seconds: dict[str, float],
) -> GradientResult:
    """Gradient of the LeapAlign loss by backpropagation through the paper's surrogate (Algorithm 1, eqs. 3-13).

    Args:
        trajectory: the rollout; only its latents and sigmas are read.
        pairs: (B, 2) int64 step indices, k_index < j_index.
        seconds: goes into the result as it is.
    """
    k, j = pairs.unbind(1)
    s_k, s_j = trajectory.sigmas[k], trajectory.sigmas[j]
    x_k, real_j, real_0 = trajectory.at(k), trajectory.at(j), trajectory.final
    with torch.enable_grad():
        leap_j = leap(x_k, s_k - s_j, velocity(transformer, x_k, s_k, conditioning))  # eq. 4
        x_j = connect(leap_j, real_j)  # eq. 5
        leap_0 = leap(x_j, s_j, velocity(transformer, discount(x_j, method.alpha), s_j, conditioning))  # eqs. 6, 9
        x_0 = connect(leap_0, real_0)  # eq. 7
        d_j, d_0 = distance(real_j, leap_j.detach()), distance(real_0, leap_0.detach())
        weights = similarity_weights(d_j, d_0, method.tau)  # eq. 12
        x_0 = x_0.requires_grad_() if not x_0.requires_grad else x_0  # all parameters frozen
        rewards = score(reward, x_0).to(weights.dtype)
        check_finite(rewards.detach(), "reward", range(len(rewards)))
        loss = hinge(rewards, weights, method.threshold).mean()  # eqs. 11, 13
    parameters = trainable(transformer)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if parameters else ()
    grads = {
        name: (torch.zeros_like(parameter) if gradient is None else gradient).to(
            torch.promote_types(parameter.dtype, torch.float32)
        )
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }
    return GradientResult(loss.detach(), rewards.detach(), weights, d_j, d_0, grads, pairs=pairs, seconds=seconds)


def connect(prediction: Tensor, real: Tensor) -> Tensor:
    """Latent connector: the value of `real`, the gradient of `prediction` (eqs. 5, 7).

    The paper writes prediction + sg(real - prediction). This order adds an exact zero to `real`, so that the forward
    value is the rollout's in every bit.
    """
    return real.detach() + (prediction - prediction.detach())


def discount(latents: Tensor, alpha: float) -> Tensor:
    """The value of `latents`, its gradient times alpha: alpha x + (1 - alpha) sg(x), exact in rounding (eq. 9)."""
    constant = latents.detach()
    return constant + alpha * (latents - constant)


def leap(latents: Tensor, width: Tensor, velocities: Tensor) -> Tensor:
    """One-step prediction x - width * v (eq. 3): (B, ...) from (B, ...), (B,) noise-level differences and (B, ...)."""
    return latents - width.reshape(-1, *[1] * (latents.ndim - 1)) * velocities


def distance(latents: Tensor, prediction: Tensor) -> Tensor:
    """(B,) mean absolute difference over everything but the batch."""
    return (latents - prediction).abs().flatten(1).mean(1)


def similarity_weights(d_j: Tensor, d_0: Tensor, tau: float) -> Tensor:
    """(B,) w = 1 / (max(d_j, tau) + max(d_0, tau)), eq. 12."""
    return 1 / (d_j.clamp(min=tau) + d_0.clamp(min=tau))
