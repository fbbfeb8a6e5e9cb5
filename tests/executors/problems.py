"""Problems that tests of the streamed executor share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0], dtype=torch.float64)


PAIRS = torch.tensor([[0, 2], [1, 3], [2, 3]])


BATCH = 3


MODES: list[Any] = ["streamed-paired", "streamed-held"]


def bounded_reward(latents: Tensor) -> Tensor:
    """Nonlinear, different for every sample, within 0.1 of 0, 1 and 0.2."""
    mixed = latents * latents.roll(1, dims=1) + latents
    return torch.tensor([0.0, 1.0, 0.2]).to(latents)[: len(latents)] + 0.1 * torch.tanh(mixed.flatten(1).mean(1))
