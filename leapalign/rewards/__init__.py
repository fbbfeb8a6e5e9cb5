"""Differentiable rewards, one file each, and their place behind the VAE. How a gradient is taken lies elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from leapalign import extensions
from leapalign.rewards.latent import LatentReward
from leapalign.rewards.protocol import Reward, RewardModel, Tower

if TYPE_CHECKING:
    from leapalign.config.keys import AlignConfig

__all__ = ["LatentReward", "Reward", "RewardModel", "Tower", "load_reward", "named", "tower_of"]

# name -> its one object
REWARDS = {
    "shapes": "leapalign.rewards.shapes:reward",
    "pickscore": "leapalign.rewards.pickscore:reward",
    "clipscore": "leapalign.rewards.clipscore:reward",
}


def named(config: AlignConfig) -> Reward:
    """The reward that `config.reward` names.

    Raises:
        UsageError: there is none of this name.
    """
    found: Reward = extensions.load("rewards", REWARDS, config.reward, key="reward")
    return found


def load_reward(config: AlignConfig, device: torch.device) -> RewardModel:
    """The frozen reward model that `config.reward` names, in float32 on the device.

    Raises:
        UsageError: its files are not there.
    """
    return named(config).load(config.reward_model_name_or_path, device)


def tower_of(config: AlignConfig) -> Tower | None:
    """What the planner counts of the config's reward; None for one too small to be counted."""
    return named(config).tower(config.reward_model_name_or_path)
