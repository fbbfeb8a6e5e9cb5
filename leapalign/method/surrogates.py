"""Surrogates: from a finished trajectory to the legs whose known cotangents make up the gradient.

A leg is one vector-Jacobian product at one rollout step. Every direct-gradient method on a flow is an ordered tuple of
legs, so a method is one file (a frozen dataclass and a function) and the executors know none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from leapalign.method.trajectory import Trajectory


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


class Method(Protocol):
    """A direct-gradient method: where it differentiates, and with which legs. Its settings are its fields."""

    @property
    def legs(self) -> int:
        """Rollout steps of a sample that are differentiated at, which is the number of velocities to be kept."""
        ...

    @property
    def threshold(self) -> float:
        """lambda of the hinge (LeapAlign, eq. 13), in the reward's units; math.inf: every sample is active."""
        ...

    def draw(self, batch: int, num_steps: int, generator: torch.Generator, /) -> Tensor:
        """(batch, legs) int64 rollout steps, rising in each row, on the generator's device."""
        ...

    def surrogate(self, trajectory: Trajectory, steps: Tensor, /) -> Surrogate:
        """The legs of a rollout that kept the velocities of exactly these (B, legs) steps."""
        ...
