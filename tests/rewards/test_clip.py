"""The CLIP rewards against transformers' own processor and model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

try:  # transformers 5; torchvision is no dependency of ours
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

from leapalign.errors import UsageError
from leapalign.rewards.clip import CLIP_STD, load_clip_reward, preprocess
from tests.families.tiny_pipeline import clip_text_config, clip_tokenizer

SIZE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIPModel with its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=8
    )
    config = CLIPConfig(
        text_config=clip_text_config(len(tokenizer)).to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIPModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            model.logit_scale.fill_(math.log(100))
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pictures(height: int, width: int, batch: int = 2) -> np.ndarray:
    """(B, H, W, 3) 8-bit noise: the hardest case for a resampler."""
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("shape", [(24, 24), (48, 48), (40, 40), (31, 50), (50, 40), (16, 16), (12, 20)])
def test_preprocessing_is_the_processors(shape: tuple[int, int]) -> None:
    images = pictures(*shape)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    theirs = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    ours = preprocess(as_tensor(images), SIZE)
    # PIL rounds to 8 bits after each of its two passes, by half a level; the second pass scales the first's error by
    # the sum of its kernel's absolute weights, at most 1.5 for the cubic with a = -0.5. Then half a level more for
    # weights of 22 bits, and the division by the smallest standard deviation.
    levels = 0.5 * 1.5 + 0.5 + 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=levels / 255 / min(CLIP_STD))


def test_the_score_is_the_models_own(folder: Path) -> None:
    prompts = ["a red dot", "blue", "a green dot"]
    images = as_tensor(pictures(40, 40, batch=3))
    cosine, logits = load_clip_reward(str(folder), "cosine"), load_clip_reward(str(folder), "logits")
    tokens = clip_tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folder)(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=preprocess(images, SIZE)
        )
    expected = output.logits_per_image.diagonal()
    # Cosines of 8 terms in float32, in another order.
    torch.testing.assert_close(cosine(images, prompts), expected / 100, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(images, prompts), expected / 100, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(cosine(images, prompts), cosine(images, prompts[::-1]))


def test_gradients_reach_the_pictures_alone_and_sample_by_sample(folder: Path) -> None:
    reward = load_clip_reward(str(folder), "cosine")
    images = as_tensor(pictures(40, 40)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["red", "blue"])[0], images)
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0
    assert not any(p.requires_grad for p in reward.model.parameters())


def test_gradients_are_the_slope(folder: Path) -> None:
    reward = load_clip_reward(str(folder), "cosine", dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    images = 0.3 + 0.4 * torch.rand(1, 3, 40, 40, generator=generator, dtype=torch.float64)  # no pixel is clamped
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["a red dot"]).sum(), images)
    step = 1e-6
    with torch.no_grad():
        slope = (
            reward(images + step * direction, ["a red dot"]) - reward(images - step * direction, ["a red dot"])
        ) / (2 * step)
    # Central differences: 1e-16 / step of rounding, step^2 of curvature.
    torch.testing.assert_close((gradient * direction).sum(), slope.sum(), rtol=1e-5, atol=1e-8)


def test_long_prompts_are_cut(folder: Path) -> None:
    reward = load_clip_reward(str(folder), "cosine")
    assert reward(as_tensor(pictures(24, 24, batch=1)), ["red " * 50]).shape == (1,)


def test_what_is_no_clip_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="could not be loaded"):
        load_clip_reward(str(tmp_path / "nowhere"), "cosine")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="is a bert model"):
        load_clip_reward(str(tmp_path), "cosine")
