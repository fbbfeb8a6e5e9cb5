"""What the trainer, the sampler, the planner and the command line ask of a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


class Shapes(Protocol):
    """What the planner asks: enough to plan a step without weights.

    Attributes:
        name: as in `leapalign.families.FAMILIES`.
        transformer_class: of diffusers, as `_class_name` in transformer/config.json says.
        published: {hub id: transformer/config.json} of gated repositories; their VAE is `autoencoder.PUBLISHED`.
    """

    name: str
    transformer_class: str
    published: Mapping[str, Mapping[str, Any]]

    def text_tokens(self, max_sequence_length: int) -> int:
        """Text tokens that a block sees."""
        ...


class PromptEncoder(Protocol):
    """The family's text encoders, loaded, in eval mode."""

    weight_bytes: int

    def to(self, device: torch.device) -> None:
        """Move the encoders."""
        ...

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        """{name: (B, ...)} for the B prompts, on the encoders' device: the transformer's own argument names."""
        ...

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, uncut, as `max_sequence_length` counts them."""
        ...


@runtime_checkable
class Family(Shapes, Protocol):
    """A family that can be trained: one object, in one file.

    Attributes:
        pipeline_class: of diffusers, as `_class_name` in model_index.json says.
        encoders: folders of the pipeline that its text encoders and tokenizers are in.
    """

    pipeline_class: str
    encoders: tuple[str, ...]

    def load_transformer(self, folder: Path | str, dtype: torch.dtype, *, subfolder: str | None = None) -> Any:
        """The diffusers transformer of a folder, or of a pipeline's subfolder."""
        ...

    def load_encoder(self, folder: Path, dtype: torch.dtype) -> PromptEncoder:
        """The text encoders of a pipeline folder, on the CPU."""
        ...

    def latent_shape(self, transformer: Any, vae: Any, resolution: int) -> tuple[int, ...]:
        """Shape of one square picture's latents as the transformer takes them; FLUX: (tokens, channels).

        Raises:
            UsageError: the side is not a whole number of patches.
        """
        ...

    def sigmas(self, scheduler: Any, num_steps: int, latent_shape: tuple[int, ...]) -> Tensor:
        """(num_steps + 1,) float32 noise levels 1 -> 0 that the family's diffusers pipeline uses."""
        ...

    def conditioning(
        self, transformer: Any, vae: Any, embeds: Mapping[str, Tensor], resolution: int, guidance_scale: float
    ) -> dict[str, Any]:
        """The transformer's keyword arguments for embeddings that are where and in which dtype they are wanted."""
        ...

    def vae_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """(B, C, h, w) what the VAE's decoder takes, from the transformer's latents; differentiable."""
        ...

    def autocast(self, transformer: Any) -> None:
        """Evaluate the transformer under bfloat16 autocast, wherever it is called from."""
        ...
