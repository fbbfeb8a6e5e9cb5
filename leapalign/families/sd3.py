"""Stable Diffusion 3: shapes alone. Its steps are planned and counted; `leapalign align` does not train it yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLIP_TOKENS = 77  # that its prompts have beside T5's

# transformer/config.json of stabilityai/stable-diffusion-3.5-medium: 2.2 billion parameters
SD35_MEDIUM: Mapping[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": tuple(range(13)),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}


class StableDiffusion3:
    """Shapes of SD3Transformer2DModel, see `leapalign.families.protocol.Shapes`."""

    name = "sd3"
    transformer_class = "SD3Transformer2DModel"
    published: Mapping[str, Mapping[str, Any]] = {"stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM}

    def text_tokens(self, max_sequence_length: int) -> int:
        """T5's tokens and CLIP's."""
        return max_sequence_length + CLIP_TOKENS


family = StableDiffusion3()
