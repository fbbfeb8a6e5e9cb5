"""What a reward is: a function of pictures and prompts, and the object that its file offers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class RewardModel(Protocol):
    """Scores pictures; higher is better. Samples do not see each other, so a batch may be split anywhere.

    In a streamed run modules that are its attributes, if they are on the CPU, are brought to the device for its phase.
    """

    def __call__(self, images: Tensor, prompts: list[str], /) -> Tensor:
        """(B, 3, H, W) pictures in [0, 1] and their B prompts -> (B,) rewards, differentiable in the pictures."""
        ...


@dataclass(frozen=True)
class Tower:
    """What the planner counts of a reward: its parameters, and the vision tower that a picture goes through.

    Attributes:
        vision: the configuration of transformers' CLIPVisionModelWithProjection.
    """

    parameters: int
    vision: Mapping[str, Any]


class Reward(Protocol):
    """A reward by its name: the one object of its file."""

    def load(self, name: str | None, device: torch.device) -> RewardModel:
        """The frozen model, in float32.

        Args:
            name: folder or hub id of the weights; None: the published ones.

        Raises:
            UsageError: its files are not there.
        """
        ...

    def tower(self, name: str | None) -> Tower | None:
        """What the planner counts; None: it is too small to be counted.

        Raises:
            UsageError: its config.json is not there.
        """
        ...
