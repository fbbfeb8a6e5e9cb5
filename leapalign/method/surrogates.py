"""Surrogates: from a finished trajectory to the legs whose known cotangents make up the gradient.

A leg is one vector-Jacobian product at one rollout step. Every direct-gradient method on a flow is an ordered tuple of
legs, so a method is one function here and the executor knows none of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.kernels.leap.prediction import leap_distances
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


@dataclass(frozen=True)
class Leg:
    """One use of the velocity in the surrogate.

    Attributes:
        step: (B,) int64 rollout step at which v_theta is differentiated, by sample.
        coefficient: (B,) what the arriving gradient is multiplied by to give the cotangent on v at that step.
    """

    step: Tensor
    coefficient: Tensor


@dataclass(frozen=True)
class Surrogate:
    """A surrogate of the rollout, as the backward pass sees it.

    With y = g = dL/dx_0 to begin with, each leg in turn has the cotangent c = coefficient * y on v at its step, adds
    (dv/dtheta)^T c to the gradient, and passes on y + discount * (dv/dx)^T c.

    Attributes:
        legs: in backward order, the one nearest to the data first.
        discount: alpha, the factor on a leg's input gradient.
        weights: (B,) similarity weights of the samples' losses.
        d_j, d_0: (B,) mean absolute distances of the two leap predictions from the rollout's latents.
    """

    legs: tuple[Leg, ...]
    discount: float
    weights: Tensor
    d_j: Tensor
    d_0: Tensor


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
