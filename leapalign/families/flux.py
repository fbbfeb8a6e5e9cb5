"""FLUX.1: packed latents, embedded guidance, shifted noise levels, position ids, T5 and CLIP prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leapalign.errors import UsageError
from leapalign.families import autoencoder
from leapalign.method.schedule import shifted_sigmas

# transformer/config.json of black-forest-labs/FLUX.1-dev: 11.9 billion parameters
FLUX1_DEV: Mapping[str, Any] = {
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


class FluxEncoder:
    """T5 and CLIP of a FLUX pipeline. In the file's own dtype their weights stay mapped from the disk."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from diffusers import FluxPipeline
        from transformers import CLIPTextModel, T5EncoderModel

        clip = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)
        t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=dtype)
        self._models = (clip, t5)
        self.weight_bytes = sum(weight.nbytes for model in self._models for weight in model.parameters())
        self._pipeline = FluxPipeline.from_pretrained(
            folder, text_encoder=clip, text_encoder_2=t5, transformer=None, vae=None
        )

    def to(self, device: torch.device) -> None:
        """Move both encoders."""
        for model in self._models:
            model.to(device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        """encoder_hidden_states (B, max_sequence_length, D_t5) and pooled_projections (B, D_clip)."""
        hidden, pooled, _ = self._pipeline.encode_prompt(
            list(prompts), device=self._models[0].device, max_sequence_length=max_sequence_length
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """T5's tokens."""
        return [len(ids) for ids in self._pipeline.tokenizer_2(list(prompts)).input_ids]


class Flux:
    """See `leapalign.families.protocol.Family`."""

    name = "flux"
    pipeline_class = "FluxPipeline"
    transformer_class = "FluxTransformer2DModel"
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    published: Mapping[str, Mapping[str, Any]] = {"black-forest-labs/FLUX.1-dev": FLUX1_DEV}

    def text_tokens(self, max_sequence_length: int) -> int:
        """T5's tokens: CLIP gives the pooled vector alone."""
        return max_sequence_length

    def load_transformer(self, folder: Path | str, dtype: torch.dtype, *, subfolder: str | None = None) -> Any:
        """A FluxTransformer2DModel."""
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel.from_pretrained(folder, subfolder=subfolder, torch_dtype=dtype)

    def load_encoder(self, folder: Path, dtype: torch.dtype) -> FluxEncoder:
        """T5 and CLIP, on the CPU."""
        return FluxEncoder(folder, dtype)

    def latent_shape(self, transformer: Any, vae: Any, resolution: int) -> tuple[int, ...]:
        """(tokens S, channels C) of one square picture of `resolution` pixels a side, packed 2 x 2.

        Raises:
            UsageError: the side is not a whole number of patches.
        """
        patch = 2 * autoencoder.scale(vae)
        if resolution < patch or resolution % patch:
            raise UsageError(f"resolution = {resolution} is not divisible by {patch}, this pipeline's patch in pixels")
        return (resolution // patch) ** 2, transformer.config.in_channels

    def sigmas(self, scheduler: Any, num_steps: int, latent_shape: tuple[int, ...]) -> Tensor:
        """(num_steps + 1,) float32 noise levels 1 -> 0: FLUX's time shift by the packed sequence's length."""
        return shifted_sigmas(scheduler, num_steps, latent_shape[0])

    def conditioning(
        self, transformer: Any, vae: Any, embeds: Mapping[str, Tensor], resolution: int, guidance_scale: float
    ) -> dict[str, Any]:
        """The embeddings; txt_ids (L, 3) zeros; img_ids (S, 3) rows and columns of the patches; guidance (B,) float32.

        Guidance is there if the transformer embeds it (FLUX.1-dev does, FLUX.1-schnell does not).
        """
        conditioning: dict[str, Any] = dict(embeds)
        text = embeds["encoder_hidden_states"]
        side = resolution // (2 * autoencoder.scale(vae))
        steps = torch.arange(side, device=text.device, dtype=text.dtype)
        zero = torch.zeros(side, side, device=text.device, dtype=text.dtype)
        rows, columns = steps[:, None].expand(side, side), steps.expand(side, side)
        conditioning["img_ids"] = torch.stack([zero, rows, columns], dim=-1).reshape(side * side, 3)
        conditioning["txt_ids"] = text.new_zeros(text.shape[1], 3)
        if transformer.config.guidance_embeds:
            conditioning["guidance"] = torch.full((len(text),), guidance_scale, device=text.device)
        return conditioning

    def vae_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """Packed (B, S, C) -> (B, C / 4, 2 h, 2 w) of a square picture, where the VAE is and in its dtype."""
        side = round(latents.shape[1] ** 0.5)
        assert side * side == latents.shape[1], f"{latents.shape[1]} tokens are no square picture"
        z = latents.to(vae.device, vae.dtype).unflatten(1, (side, side)).unflatten(-1, (-1, 2, 2))
        return z.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, h, w, C/4, 2, 2) -> (B, C/4, 2 h, 2 w)

    def autocast(self, transformer: Any) -> None:
        """Evaluate the transformer under bfloat16 autocast, wherever it is called from.

        Without autocast's weight cache: it would hold a bfloat16 copy of the model, and copies made without grad in the
        rollout would be found again by the pass that needs one.
        """
        device = next(transformer.parameters()).device.type
        full = torch.autocast(device, enabled=False)
        # FLUX casts the timestep to this layer's output dtype: bfloat16 would move it by up to 2/1000.
        transformer.x_embedder.forward = full(transformer.x_embedder.forward)
        transformer.forward = torch.autocast(device, torch.bfloat16, cache_enabled=False)(transformer.forward)


family = Flux()
