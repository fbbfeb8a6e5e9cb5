"""LeapAlign: two leaps between rollout steps, k -> j -> 0 (arXiv 2604.15311)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.kernels.leap.prediction import leap_distances
from leapalign.method.draws import random_pairs
from leapalign.method.surrogates import Leg, Surrogate
from leapalign.method.trajectory import Trajectory


@dataclass(frozen=True)
class LeapAlign:
    """Settings of LeapAlign with two leaps (LeapAlign, arXiv 2604.15311).

    Attributes:
        alpha: gradient discount of the second leap's input, in [0, 1] (eqs. 9, 10). 0 drops the nested term.
        tau: lower bound of each leap distance in the similarity weight, in latent units (eq. 12).
        threshold: lambda of the hinge (eqs. 11, 13), in the reward's own units; samples at or above it add nothing.
            The paper's values: 0.55 for HPSv2.1, 0.4 for PickScore as a cosine, 13.5 for HPSv3.

    Raises:
        ValueError: alpha outside [0, 1], tau not positive, or a threshold that is not finite.
    """

    alpha: float = 0.3
    tau: float = 0.1
    threshold: float = 0.55

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]; the paper uses 0.1 to 0.3")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau={self.tau} must be positive and finite; the paper uses 0.1")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold={self.threshold} must be a finite number on the reward's scale")

    @property
    def legs(self) -> int:
        """Two: k and j."""
        return 2

    def draw(self, batch: int, num_steps: int, generator: torch.Generator, /) -> Tensor:
        """(batch, 2) pairs k_index < j_index, uniform over the pairs of distinct steps."""
        return random_pairs(batch, num_steps, generator)

    def surrogate(self, trajectory: Trajectory, steps: Tensor, /) -> Surrogate:
        """The two leaps, see `leapalign2`."""
        return leapalign2(trajectory, steps, self)


@torch.no_grad()
def leapalign2(trajectory: Trajectory, pairs: Tensor, method: LeapAlign) -> Surrogate:
    """LeapAlign with two leaps, k -> j -> 0 (LeapAlign, arXiv 2604.15311, eqs. 3-10 and 12).

    c_j = -s_j g, then c_k = -(s_k - s_j) y with y = g + alpha (dv(x_j)/dx)^T c_j. Sigmas fall along the rollout, so
    s_k > s_j; the second leap goes all the way to 0, hence s_j and not a step width.

    Args:
        trajectory: a rollout that kept the velocities of exactly these pairs.
        pairs: (B, 2) int64 step indices, k_index < j_index.
    """
    assert torch.equal(trajectory.steps, pairs), "the rollout kept the velocities of other steps"
    k, j = pairs.unbind(1)
    s_k, s_j = trajectory.sigmas[k], trajectory.sigmas[j]
    v_k, v_j = trajectory.velocities.unbind(1)
    x_k, x_j = trajectory.at(k), trajectory.at(j)
    d_j, d_0, weights = leap_distances(x_k, v_k, x_j, v_j, trajectory.final, s_k, s_j, method.tau)
    return Surrogate((Leg(j, -s_j), Leg(k, -(s_k - s_j))), method.alpha, weights, d_j, d_0)
