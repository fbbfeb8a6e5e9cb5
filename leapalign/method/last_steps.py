"""The last steps of the rollout themselves: backpropagation without a surrogate's approximation (DRaFT-K)."""

from __future__ import annotations

import torch

from leapalign.method.surrogates import Leg, Surrogate
from leapalign.method.trajectory import Trajectory


@torch.no_grad()
def last_steps(trajectory: Trajectory, length: int) -> Surrogate:
    """The last `length` steps of the rollout themselves: backpropagation through them, without any approximation.

    x_{i+1} = x_i - (s_i - s_{i+1}) v_i, so c_i = -(s_i - s_{i+1}) y with y the gradient at x_{i+1}, and the discount is
    1 (DRaFT-K, arXiv 2309.17400, with K = length; all steps: the full trajectory). All weights are 1.

    Args:
        trajectory: of any rollout; its legs are at steps T - length ... T - 1.

    Raises:
        ValueError: length is not from 1 to T.
    """
    sigmas, count = trajectory.sigmas, trajectory.sigmas.shape[0] - 1
    if not 1 <= length <= count:
        raise ValueError(f"length={length} must be from 1 to {count}, the rollout's steps")
    final = trajectory.final
    ones, zeros = final.new_ones(len(final)), final.new_zeros(len(final))
    legs = tuple(
        Leg(torch.full_like(ones, i, dtype=torch.int64), ones * (sigmas[i + 1] - sigmas[i]))
        for i in reversed(range(count - length, count))
    )
    return Surrogate(legs, 1.0, ones, zeros, zeros)
