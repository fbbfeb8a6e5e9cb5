"""Whole pipelines of published sizes with random weights: speed and memory do not depend on what the weights are.

Weights are drawn where the model computes, a block at a time, and go from there straight into the memory that trains:
of FLUX.1-dev's 24 GB there is no second copy, and no CPU draws 12 billion numbers. They are distributed as modules are
initialised by torch (uniform up to 1/√fan-in, norms 1), so that activations keep their size through 57 blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.memory.store import BlockStore
from leapalign.engine.planning.workload import RewardLoad
from leapalign.engine.streaming.partition import default_dtype
from leapalign.families.autoencoder import PUBLISHED as VAE
from leapalign.families.flux import FLUX1_DEV
from leapalign.planning.reward_loads import count_reward
from leapalign.rewards.clip import ClipReward
from leapalign.rewards.pickscore import PUBLISHED as PICKSCORE_TOWER
from leapalign.rewards.protocol import RewardModel
from leapalign.zoo.shapes import PIPELINE_FOLDER
from leapalign.zoo.shapes.reward import load_shapes_reward

_FIRST, _LAST, _WORDS = 49406, 49407, 8  # CLIP's first and last token, and how many stand in between
_VIT_H_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}


@dataclass(frozen=True)
class Sizes:
    """A FLUX pipeline's shapes, and the step that is measured unless another one is asked for.

    Attributes:
        transformer, vae, scheduler: their config.json.
        clip: text_config, vision_config and projection_dim of the reward's CLIP model; None: the packaged reward.
        text_tokens: of a prompt.
        resolution: pixels a side.
        batch, steps: images and rollout steps of an optimizer step.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    clip: Mapping[str, Any] | None
    text_tokens: int
    resolution: int
    batch: int
    steps: int

    def with_blocks(self, double: int, single: int) -> Sizes:
        """The same with so many blocks of each kind."""
        return replace(self, transformer={**self.transformer, "num_layers": double, "num_single_layers": single})

    @property
    def patch(self) -> int:
        """Pixels a token's side."""
        return int(2 ** len(self.vae["block_out_channels"]))

    def reward_loads(self, resolution: int) -> tuple[RewardLoad, ...]:
        """What VAE and reward take on the device, with the VAE's blocks kept and recomputed; see `RewardLoad`."""
        clip = None
        if self.clip is not None:
            parameters = sum(parameter.numel() for parameter in _clip_model(self.clip, "meta").parameters())
            clip = parameters, json.dumps(self.clip["vision_config"])
        vae = json.dumps(dict(self.vae))
        return tuple(count_reward(vae, clip, resolution, checkpointed) for checkpointed in (False, True))


def _packaged(part: str, file: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((PIPELINE_FOLDER / part / file).read_text())
    return found


def shapes() -> Sizes:
    """The packaged pipeline and its reward."""
    scheduler = _packaged("scheduler", "scheduler_config.json")
    return Sizes(_packaged("transformer"), _packaged("vae"), scheduler, None, 9, resolution=32, batch=48, steps=12)


def flux1_dev() -> Sizes:
    """FLUX.1-dev with its VAE and a reward of PickScore's size (CLIP ViT-H/14): 11.9, 0.08 and 0.99 billion."""
    clip = {"text_config": _VIT_H_TEXT, "vision_config": dict(PICKSCORE_TOWER.vision), "projection_dim": 1024}
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True}
    vae = {**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    return Sizes(FLUX1_DEV, vae, scheduler, clip, 512, resolution=512, batch=8, steps=25)


def tiny() -> Sizes:
    """Everything that `flux1_dev` has, at toy sizes."""
    transformer = {**FLUX1_DEV, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "in_channels": 16}
    transformer |= {"joint_attention_dim": 16, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 2}
    transformer |= {"pooled_projection_dim": 16}
    vae = {**VAE, "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 4}
    vae |= {"layers_per_block": 1, "norm_num_groups": 4, "up_block_types": ("UpDecoderBlock2D",) * 2}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    clip = {"text_config": tower, "vision_config": {**tower, "patch_size": 14, "image_size": 28, "projection_dim": 8}}
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True}
    return Sizes(transformer, vae, scheduler, {**clip, "projection_dim": 8}, 6, resolution=16, batch=3, steps=3)


MODELS = {"shapes": shapes, "flux1_dev": flux1_dev, "tiny": tiny}

# ---- weights -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(store: BlockStore, device: torch.device, *, seed: int = 0) -> None:
    """Draw all weights of a streamed model on the device, a unit at a time, into its store."""
    generator = torch.Generator(device).manual_seed(seed)
    for unit in store.units.values():
        flat = torch.zeros(unit.numel, dtype=store.dtype, device=device)
        for name, view in unit.views(flat).items():
            if view.ndim >= 2:
                bound = 1 / math.sqrt(view[0].numel())
                view.uniform_(-bound, bound, generator=generator)
            elif name.endswith("bias"):
                view.uniform_(-0.02, 0.02, generator=generator)
            else:  # of a norm
                view.fill_(1)
        store.region(unit.name).copy_(flat)


def transformer(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A FluxTransformer2DModel with weights of its own on the device."""
    from diffusers import FluxTransformer2DModel

    with _drawing(device), default_dtype(dtype):
        model: nn.Module = FluxTransformer2DModel.from_config(
            {k: v for k, v in sizes.transformer.items() if k[0] != "_"}
        )
    return model.eval().requires_grad_(True)


def vae(sizes: Sizes, device: torch.device) -> Any:
    """A frozen AutoencoderKL in float32, made on the device and moved to host memory."""
    from diffusers import AutoencoderKL

    with _drawing(device):
        model = AutoencoderKL.from_config(sizes.vae)
    return model.to("cpu").eval().requires_grad_(False)


def reward(sizes: Sizes, device: torch.device) -> RewardModel:
    """A reward model in float32, made on the device and moved to host memory."""
    if sizes.clip is None:
        return load_shapes_reward("cpu")
    model = _clip_model(sizes.clip, device).to("cpu").eval().requires_grad_(False)
    return ClipReward(model, _Tokens(), "cosine")


def _clip_model(clip: Mapping[str, Any], device: torch.device | str) -> Any:
    from transformers import CLIPConfig, CLIPModel

    with _drawing(torch.device(device)):
        return CLIPModel(CLIPConfig(**clip))


@contextmanager
def _drawing(device: torch.device) -> Iterator[None]:
    """Modules made inside draw their weights on the device, the same ones every time."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        yield


# ---- inputs --------------------------------------------------------------------------------------------------------


def embeddings(sizes: Sizes, batch: int) -> dict[str, Tensor]:
    """What the text encoders would give for so many prompts, on the CPU in float32."""
    generator = torch.Generator().manual_seed(1)
    width, pooled = sizes.transformer["joint_attention_dim"], sizes.transformer["pooled_projection_dim"]
    return {
        "encoder_hidden_states": torch.randn(batch, sizes.text_tokens, width, generator=generator),
        "pooled_projections": torch.randn(batch, pooled, generator=generator),
    }


def prompts(batch: int) -> list[str]:
    """Of the pictures: texts that every tokenizer takes."""
    return [f"a red circle {index}" for index in range(batch)]


class _Tokens:
    """In a tokenizer's place: as many tokens as a short prompt has, the same ones for the same prompt."""

    def __call__(self, prompts: list[str], **_: Any) -> Any:
        from transformers import BatchEncoding

        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(int.from_bytes(prompt[-4:].encode(), "little"))
            words = torch.randint(_FIRST, (_WORDS,), generator=generator)
            rows.append(torch.tensor([_FIRST, *words.tolist(), _LAST]))
        ids = torch.stack(rows)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
