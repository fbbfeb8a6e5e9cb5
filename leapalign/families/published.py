"""Shapes of models, so that a step can be planned and simulated without their weights.

Those of published models are here, from the config.json files of the repositories, whose weights are gated. Others' are
read from a folder or the hub.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leapalign.errors import UsageError
from leapalign.rewards.clip import CLIPSCORE, PICKSCORE

if TYPE_CHECKING:
    from leapalign.config.keys import AlignConfig

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
    vision: Mapping[str, Any]


# config.json of PickScore (CLIP ViT-H/14) and of CLIPScore's CLIP ViT-L/14
CLIPS: Mapping[str, Clip] = {
    PICKSCORE: Clip(
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
    CLIPSCORE: Clip(
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


def transformer_config(config: AlignConfig) -> Mapping[str, Any]:
    """transformer/config.json of the pipeline: known for its name, or from its folder or the hub.

    Raises:
        UsageError: it is not there.
    """
    name = config.pretrained_model_name_or_path
    return TRANSFORMERS[name] if name in TRANSFORMERS else _read(name, "transformer")


def vae_config(config: AlignConfig) -> Mapping[str, Any]:
    """vae/config.json of the pipeline, in the same way."""
    name = config.pretrained_model_name_or_path
    return VAE if name in TRANSFORMERS else _read(name, "vae")


def clip_of(config: AlignConfig) -> Clip | None:
    """The CLIP model of the config's reward; None for the packaged reward, which has none.

    Raises:
        UsageError: its config.json is not there.
    """
    if config.reward == "shapes":
        return None
    name = config.reward_model_name_or_path or {"pickscore": PICKSCORE, "clipscore": CLIPSCORE}[config.reward]
    return CLIPS[name] if name in CLIPS else _read_clip(name)


def _read(name: str, part: str) -> Mapping[str, Any]:
    from leapalign.families.pipeline import resolve_model

    source = resolve_model(name)
    found: Mapping[str, Any]
    try:
        if isinstance(source, Path):
            found = json.loads((source / part / "config.json").read_text(encoding="utf-8"))
        else:
            found = _from_hub(source, part)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"pretrained_model_name_or_path = '{name}': {part}/config.json, from which memory is planned, could not be "
            f"read: {reason}; name a pipeline folder, a hub id within reach, or one of {', '.join(TRANSFORMERS)}"
        ) from error
    return found


@functools.cache
def _from_hub(name: str, part: str) -> Mapping[str, Any]:
    from diffusers import AutoencoderKL

    found: Mapping[str, Any] = AutoencoderKL.load_config(name, subfolder=part)  # of any class: it reads config.json
    return found


@functools.cache
def _read_clip(name: str) -> Clip:
    from transformers import CLIPConfig, CLIPModel

    try:
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():  # defaults would stand for it
            raise FileNotFoundError(f"{name} has none")
        shapes = CLIPConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"reward_model_name_or_path = '{name}': its config.json, from which memory is planned, could not be read: "
            f"{reason}; name the folder or hub id of a CLIP model"
        ) from error
    with torch.device("meta"):
        model = CLIPModel(shapes)
    return Clip(sum(each.numel() for each in model.parameters()), shapes.vision_config.to_dict())
