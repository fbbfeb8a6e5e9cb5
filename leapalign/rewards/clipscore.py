"""CLIPScore: how well OpenAI's CLIP ViT-L/14 finds picture and text agree, cosine times logit scale over 100."""

from __future__ import annotations

import torch

from leapalign.rewards.clip import CLIPSCORE, clip_tower, load_clip_reward
from leapalign.rewards.protocol import RewardModel, Tower

# config.json of the published model
PUBLISHED = Tower(
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
)


class ClipScore:
    """See `leapalign.rewards.protocol.Reward`."""

    def load(self, name: str | None, device: torch.device) -> RewardModel:
        """The model of this folder or hub id."""
        return load_clip_reward(name or CLIPSCORE, "logits", device=device)

    def tower(self, name: str | None) -> Tower:
        """Parameters of both towers, and the vision tower."""
        return PUBLISHED if name in (None, CLIPSCORE) else clip_tower(str(name))


reward = ClipScore()
