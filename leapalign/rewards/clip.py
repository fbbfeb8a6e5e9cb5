"""PickScore and CLIPScore: how well a CLIP model finds picture and text agree, differentiable in the picture."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from leapalign.errors import UsageError
from leapalign.rewards.protocol import Tower

if TYPE_CHECKING:
    from transformers import CLIPModel

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # its authors' choice of tokenizer and preprocessing
CLIPSCORE = "openai/clip-vit-large-patch14"
# The normalisation of CLIP's training data, per RGB channel (arXiv 2103.00020, published code).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(
    images: Tensor, size: int, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> Tensor:
    """CLIP's preprocessing as a differentiable function: short side to `size` bicubic, centre crop, normalise.

    Antialiased bicubic resampling has PIL's kernel (a = -0.5). Like PIL it goes along the width first and then along
    the height, clamping overshoots to [0, 1] after each, so the values are CLIPProcessor's up to its rounding to 8 bits
    (only for very tall pictures PIL goes the other way).

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, size, size) in the dtype of `images`.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != size:
        new_height, new_width = size * height // short, size * width // short
        for shape in ((height, new_width), (new_height, new_width)):
            images = F.interpolate(images, size=shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


@dataclass(frozen=True)
class ClipReward:
    """A RewardModel: the score of each picture with its own prompt.

    Attributes:
        model: frozen, in eval mode.
        tokenizer: the model's own.
        score: "cosine" (PickScore as the paper uses it: its threshold 0.4 is on this scale), or "logits": cosine times
            the learned logit scale, over 100 (CLIPScore).
    """

    model: CLIPModel
    tokenizer: Any
    score: Literal["cosine", "logits"] = "cosine"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) in the model's dtype. Gradients reach the pictures alone."""
        pixels = preprocess(images, self.model.config.vision_config.image_size).to(self.model.dtype)
        picture = _features(self.model.get_image_features(pixel_values=pixels))
        cosine = F.cosine_similarity(picture, self._texts(prompts), dim=-1)
        return cosine if self.score == "cosine" else cosine * self.model.logit_scale.exp() / 100

    @torch.no_grad()
    def _texts(self, prompts: list[str]) -> Tensor:
        """(B, D) text embeddings; prompts beyond the model's positions (77 tokens) are cut."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        return _features(self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask))


def load_clip_reward(
    name: str,
    score: Literal["cosine", "logits"],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipReward:
    """Load a CLIPModel and its tokenizer from a folder or hub id, frozen.

    A folder without a tokenizer (as PickScore was published) takes that of CLIP ViT-H-14, which all CLIP models share.

    Raises:
        UsageError: it does not exist or is no CLIP model.
    """
    from transformers import CLIPModel, CLIPTokenizer

    key = f"reward_model_name_or_path = '{name}'"
    folder = Path(name)
    if folder.is_dir() and (folder / "config.json").is_file():
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "clip":
            raise UsageError(f"{key} is a {kind} model; name a CLIP model")
    try:
        model = CLIPModel.from_pretrained(name, dtype=dtype)
        tokenizer = CLIPTokenizer.from_pretrained(name if _has_tokenizer(name) else PICKSCORE_PROCESSOR)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{key} could not be loaded: {reason}") from error
    return ClipReward(model.to(device).eval().requires_grad_(False), tokenizer, score)


def _features(output: Any) -> Tensor:
    """transformers 5 wraps the projected embedding in an output object, transformers 4 returns it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _has_tokenizer(name: str) -> bool:
    folder = Path(name)
    if folder.is_dir():
        return any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json"))
    return name != PICKSCORE


@functools.cache
def clip_tower(name: str) -> Tower:
    """Of the CLIP model in a folder or hub id, from its config.json.

    Raises:
        UsageError: it is not there.
    """
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
    return Tower(sum(each.numel() for each in model.parameters()), shapes.vision_config.to_dict())
