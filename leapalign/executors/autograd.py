"""The decoupled executor: rollout, reward gradient and products one after another, all weights on the device.

The phases share nothing but values, because the reward gradient depends only on the value of x_0 and the weights only
on cached values. So no graph spans two phases or two legs, and peak memory is the largest phase's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.velocity import evaluation_mode, select
from leapalign.engine.passes.vjp import ensure_grads, trainable, velocity_vjp
from leapalign.kernels.leap.cotangents import leg_cotangent
from leapalign.method.reward_gradient import reward_gradient
from leapalign.method.surrogates import Surrogate
from leapalign.method.task import GradientResult, GradientTask, timed
from leapalign.method.trajectory import Trajectory, rollout


class Autograd:
    """Gradients by torch's autograd, one leg and microbatch at a time."""

    delivers = False
    streams = False

    def __call__(self, task: GradientTask, /) -> GradientResult:
        """Roll out, take the reward's gradient, run the surrogate's legs; see `leapalign.alignment_gradients`."""
        seconds: dict[str, float] = {}
        device, method = task.noise.device, task.method
        with evaluation_mode(task.transformer):
            with timed(seconds, "rollout", device):
                trajectory = rollout(
                    task.transformer, task.conditioning, task.noise, task.sigmas,
                    keep=task.steps, microbatch=task.microbatch,
                )  # fmt: skip
            surrogate = method.surrogate(trajectory, task.steps)
            with timed(seconds, "reward", device):
                rewards, loss, g = reward_gradient(
                    task.reward, trajectory.final, surrogate.weights, method.threshold, microbatch=task.microbatch
                )
            with timed(seconds, "vjp", device):
                grads = surrogate_gradients(
                    task.transformer, task.conditioning, trajectory, surrogate, g * task.scale,
                    microbatch=task.microbatch,
                )  # fmt: skip
        return GradientResult(
            loss, rewards, surrogate.weights, surrogate.d_j, surrogate.d_0, grads, pairs=task.steps, seconds=seconds
        )


autograd = Autograd()


def surrogate_gradients(
    transformer: nn.Module,
    conditioning: Mapping[str, Any],
    trajectory: Trajectory,
    surrogate: Surrogate,
    g: Tensor,
    *,
    microbatch: int | None = None,
) -> dict[str, Tensor]:
    """Run the surrogate's legs from g = dL/dx_0 and return {parameter name: gradient} (eq. 10).

    Samples whose g is exactly zero (hinge inactive) add nothing and are left out of every product. One graph of
    `microbatch` samples and one leg lives at a time.
    """
    grads: dict[str, Tensor] = {}
    ensure_grads(grads, trainable(transformer))
    active = torch.nonzero(g.flatten(1).any(1)).flatten()
    if not grads or active.numel() == 0:
        return grads
    given = select(conditioning, active)
    y, u = g[active], None
    for index, leg in enumerate(surrogate.legs):
        cotangent, y = leg_cotangent(y, u, surrogate.discount, leg.coefficient[active])
        passes_on = index + 1 < len(surrogate.legs) and surrogate.discount != 0
        u = velocity_vjp(
            transformer,
            trajectory.at(leg.step)[active],
            trajectory.sigmas[leg.step][active],
            given,
            cotangent,
            grads=grads,
            input_grad=passes_on,
            microbatch=microbatch,
        )
    return grads
