"""Shapes of published models, so that a step can be planned and simulated without their files.

From the config.json files of the repositories, whose weights are gated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

# vae/config.json of both: 84 million parameters, 16 latent channels
VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


@dataclass(frozen=True)
class Clip:
    """A CLIP model's towers, and the number of their parameters."""

    parameters: int
    vision: Mapping[str, int]


# config.json of yuvalkirstain/PickScore_v1 (CLIP ViT-H/14) and openai/clip-vit-large-patch14
CLIPS: Mapping[str, Clip] = {
    "pickscore": Clip(
        986_109_441,
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "image_size": 224,
            "projection_dim": 1024,
        },
    ),
    "clipscore": Clip(
        427_616_513,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "image_size": 224,
            "projection_dim": 768,
        },
    ),
}

TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "black-forest-labs/FLUX.1-dev": FLUX1_DEV,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
}
