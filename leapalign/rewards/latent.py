"""A reward seen through the VAE: a function of latents, as the method wants it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from leapalign.rewards.protocol import RewardModel


class Decoder(Protocol):
    """What is asked of a pipeline, see `leapalign.families.pipeline.FlowPipeline`."""

    @property
    def vae(self) -> Any: ...

    def decode(self, latents: Tensor, /) -> Tensor: ...

    def visit(self, *models: object) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class LatentReward:
    """A reward model seen through the VAE: packed latents (B, S, C) -> (B,), for the B `prompts`."""

    pipeline: Decoder
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
