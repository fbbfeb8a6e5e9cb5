"""The VAE, of one kind in FLUX.1 and SD3: its published shapes, its scale, and pictures from its latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# vae/config.json of both: 84 million parameters, 16 latent channels
PUBLISHED: Mapping[str, Any] = {
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


def scale(vae: Any) -> int:
    """Pixels a latent pixel, along one side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of latents (B, C, h, w) in the VAE's dtype, where it is; differentiable.

    z / scaling_factor + shift_factor, VAE, x * 0.5 + 0.5, clamp. The clamp stops the gradient of saturated pixels.
    Never tiled: seams of tiles change the gradient.
    """
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pictures: Tensor = (vae.decode(z, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)
    return pictures
