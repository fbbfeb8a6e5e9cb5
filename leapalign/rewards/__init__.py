"""Reward models: differentiable functions of pictures and prompts, and their place behind the VAE."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from leapalign.errors import UsageError

if TYPE_CHECKING:
    from leapalign.config.keys import AlignConfig
    from leapalign.families.pipeline import FlowPipeline


class RewardModel(Protocol):
    """Scores pictures; higher is better. Samples do not see each other, so a batch may be split anywhere.

    In a streamed run modules that are its attributes, if they are on the CPU, are brought to the device for its phase.
    """

    def __call__(self, images: Tensor, prompts: list[str], /) -> Tensor:
        """(B, 3, H, W) pictures in [0, 1] and their B prompts -> (B,) rewards, differentiable in the pictures."""
        ...


@dataclass(frozen=True)
class LatentReward:
    """A reward model seen through the VAE: packed latents (B, S, C) -> (B,), for the B `prompts`."""

    pipeline: FlowPipeline
    model: RewardModel
    prompts: Sequence[str]

    def __call__(self, latents: Tensor) -> Tensor:
        return self.model(self.pipeline.decode(latents), list(self.prompts))

    def visit(self) -> AbstractContextManager[None]:
        """Inside the block VAE and reward model are on the device."""
        return self.pipeline.visit(self.pipeline.vae, self.model)

    def select(self, rows: slice) -> LatentReward:
        """The reward of some rows of the batch, with their own prompts: VAE and reward then run by microbatch."""
        return replace(self, prompts=self.prompts[rows])


def load_reward(config: AlignConfig) -> RewardModel:
    """The frozen reward model that `config.reward` names, in float32 on the run's device; of a streamed run on the CPU.

    Raises:
        UsageError: its files are not there.
    """
    from leapalign.families.pipeline import resolve_device

    device = resolve_device(config.device if config.executor == "autograd" else "cpu")
    if config.reward == "shapes":
        from leapalign.zoo.shapes.reward import load_shapes_reward

        try:
            return load_shapes_reward(device)
        except FileNotFoundError as error:
            raise UsageError(f"reward = shapes: {error}; install the package with its data files") from error
    from leapalign.rewards import clip

    name = config.reward_model_name_or_path
    if config.reward == "pickscore":
        return clip.load_clip_reward(name or clip.PICKSCORE, "cosine", device=device)
    if config.reward == "clipscore":
        return clip.load_clip_reward(name or clip.CLIPSCORE, "logits", device=device)
    raise UsageError(f"reward = {config.reward} is unknown; use shapes, pickscore or clipscore")
