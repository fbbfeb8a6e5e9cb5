"""PickScore: a CLIP ViT-H/14 trained on people's choices, as a cosine (arXiv 2305.01569)."""

from __future__ import annotations

import torch

from leapalign.rewards.clip import PICKSCORE, clip_tower, load_clip_reward
from leapalign.rewards.protocol import RewardModel, Tower

# config.json of the published model
PUBLISHED = Tower(
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
)


class PickScore:
    """See `leapalign.rewards.protocol.Reward`."""

    def load(self, name: str | None, device: torch.device) -> RewardModel:
        """The model of this folder or hub id."""
        return load_clip_reward(name or PICKSCORE, "cosine", device=device)

    def tower(self, name: str | None) -> Tower:
        """Parameters of both towers, and the vision tower."""
        return PUBLISHED if name in (None, PICKSCORE) else clip_tower(str(name))


reward = PickScore()
