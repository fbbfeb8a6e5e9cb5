"""Problems whose gradients tests of the method compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.25, 0.0], dtype=torch.float64)


OFFSETS = torch.tensor([0.0, 1.0, 0.2])  # rewards stay within 0.1 of these: 0.5 lies between the samples


def bounded_reward(latents: Tensor, offsets: Tensor = OFFSETS) -> Tensor:
    """Nonlinear, different for every sample, within 0.1 of the offsets."""
    mixed = latents * latents.roll(1, dims=1) + latents
    return offsets[: len(latents)].to(latents) + 0.1 * torch.tanh(mixed.flatten(1).mean(1))


def linear_problem(linear_flow: Any) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    noise, q = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    pooled = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return linear_flow(), {"pooled_projections": pooled}, noise, 0.1 * q
