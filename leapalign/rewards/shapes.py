"""The packaged reward of the packaged pipeline, a hundredth of its VAE."""

from __future__ import annotations

import torch

from leapalign.errors import UsageError
from leapalign.rewards.protocol import RewardModel, Tower
from leapalign.zoo.shapes.reward import load_shapes_reward


class Shapes:
    """See `leapalign.rewards.protocol.Reward`."""

    def load(self, name: str | None, device: torch.device) -> RewardModel:
        """The packaged model."""
        try:
            return load_shapes_reward(device)
        except FileNotFoundError as error:
            raise UsageError(f"reward = shapes: {error}; install the package with its data files") from error

    def tower(self, name: str | None) -> Tower | None:
        """Not counted."""
        return None


reward = Shapes()
