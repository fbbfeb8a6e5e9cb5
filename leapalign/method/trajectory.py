"""The rollout: Euler steps from noise to data without grad, and the record that every later phase reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.velocity import microbatches, select, timestep_scale, velocity

# (step i, rows of the batch, their latents before the step) -> their velocities, in the latents' dtype
Evaluate = Callable[[int, slice, Tensor], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """What a rollout of T steps visited. Nothing here requires grad.

    Attributes:
        latents: (T + 1, B, ...) float32 or float64; latents[i] is at noise level sigmas[i].
        sigmas: (T + 1,) same dtype, falling from 1 to 0.
        steps: (B, n) int64, the steps whose velocities were kept, by sample.
        velocities: (B, n, ...) velocities at those steps.
    """

    latents: Tensor
    sigmas: Tensor
    steps: Tensor
    velocities: Tensor

    def at(self, step: Tensor) -> Tensor:
        """(B, ...) latents before step step[b] of each sample b; `step` is (B,) int64."""
        return self.latents[step, torch.arange(step.shape[0], device=step.device)]

    @property
    def final(self) -> Tensor:
        """(B, ...) the image latents x_0."""
        return self.latents[-1]


def rollout(
    transformer: nn.Module,
    conditioning: Mapping[str, Any],
    noise: Tensor,
    sigmas: Tensor,
    *,
    keep: Tensor | None = None,
    microbatch: int | None = None,
) -> Trajectory:
    """The trajectory of a transformer that is called once a step and microbatch, see `euler`.

    Args:
        noise: (B, ...) float32 or float64, the latents at sigmas[0].
        sigmas: (T + 1,) falling to 0.
        keep: (B, n) int64 step indices whose velocities are wanted; None for none.
        microbatch: rows a transformer call; None for all of them.
    """
    scale = timestep_scale(transformer)
    sigmas = sigmas.to(device=noise.device, dtype=noise.dtype)

    def evaluate(step: int, rows: slice, latents: Tensor) -> Tensor:
        return velocity(transformer, latents, sigmas[step], select(conditioning, rows), scale=scale)

    return euler(evaluate, noise, sigmas, keep=None if keep is None else keep.tolist(), microbatch=microbatch)


@torch.no_grad()
def euler(
    evaluate: Evaluate,
    noise: Tensor,
    sigmas: Tensor,
    *,
    keep: Sequence[Sequence[int]] | None = None,
    microbatch: int | None = None,
) -> Trajectory:
    """x_{i+1} = x_i + (s_{i+1} - s_i) v_theta(x_i, s_i) for i = 0 ... T-1, from x at s_0 = 1 to x at s_T = 0.

    Latents stay in the noise's dtype between the steps (diffusers' scheduler also steps in float32). Nothing depends on
    a tensor's values, so it also runs on fake tensors.

    Args:
        evaluate: the velocity, (step, rows of the batch, (rows, ...) latents) -> (rows, ...).
        noise: (B, ...) float32 or float64, the latents at sigmas[0].
        sigmas: (T + 1,) falling to 0.
        keep: B times n steps whose velocities are wanted; None for none.
        microbatch: rows a call of `evaluate`, which then takes all steps of these rows first; None for all of them.
    """
    num_steps, batch = sigmas.shape[0] - 1, noise.shape[0]
    sigmas = sigmas.to(device=noise.device, dtype=noise.dtype)
    keep = [()] * batch if keep is None else keep
    steps = torch.tensor([list(row) for row in keep], dtype=torch.int64, device=noise.device)
    latents = noise.new_empty(num_steps + 1, *noise.shape)  # kept to the end of the step: any of them may start a leap
    velocities = noise.new_empty(batch, steps.shape[1], *noise.shape[1:])
    latents[0] = noise
    for rows in microbatches(batch, microbatch):
        for i in range(num_steps):
            v = evaluate(i, rows, latents[i, rows])
            latents[i + 1, rows] = latents[i, rows] + (sigmas[i + 1] - sigmas[i]) * v
            for sample in range(rows.start, rows.stop):
                for slot, step in enumerate(keep[sample]):
                    if step == i:
                        velocities[sample, slot] = v[sample - rows.start]
    return Trajectory(latents, sigmas, steps, velocities)
