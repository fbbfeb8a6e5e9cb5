"""A reward by its name: the model that scores, and what the planner counts of it."""

from __future__ import annotations

import torch

from leapalign import extensions
from leapalign.rewards import REWARDS
from leapalign.rewards.protocol import Reward, RewardModel, Tower


def load_reward(name: str, weights: str | None, device: torch.device) -> RewardModel:
    """The frozen model of a reward, in float32 on the device.

    Args:
        name: in `REWARDS`, of an entry point, or "module:attribute".
        weights: folder or hub id; None: the published ones.

    Raises:
        UsageError: there is no such reward, or its files are not there.
    """
    return _named(name).load(weights, device)


def tower_of(name: str, weights: str | None) -> Tower | None:
    """What the planner counts of a reward; None for one too small to be counted.

    Raises:
        UsageError: there is no such reward, or its config.json is not there.
    """
    return _named(name).tower(weights)


def _named(name: str) -> Reward:
    found: Reward = extensions.load("rewards", REWARDS, name, key="reward")
    return found
