"""What the VAE and the reward model take on the device, counted on meta tensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leapalign.engine.planning.counting import Counting, DeviceCounter, gpu_operators
from leapalign.engine.planning.replay import Replay
from leapalign.engine.planning.workload import RewardLoad
from leapalign.families.source import vae_config
from leapalign.rewards.clip import preprocess
from leapalign.rewards.loading import tower_of

if TYPE_CHECKING:
    from leapalign.config.keys import AlignConfig

_REPLAY = Replay()  # both ways of running the reward, and sampling, have most operators in common
BLOCKS = ("ResnetBlock2D", "Attention", "CLIPEncoderLayer")  # classes whose instances are launched one by one


def reward_loads(config: AlignConfig, *, gradients: bool = True) -> tuple[RewardLoad, ...]:
    """The VAE's decoder and the reward model, in float32, for one picture.

    With gradients twice: as they are, and with the VAE's blocks recomputed. The packaged shapes reward is a hundredth
    of its VAE and not counted.

    Raises:
        UsageError: their shapes are not known.
    """
    vae, clip = json.dumps(dict(vae_config(config))), tower_of(config.reward, config.reward_model_name_or_path)
    sizes = None if clip is None else (clip.parameters, json.dumps(dict(clip.vision)))
    ways = (False, True) if gradients else (False,)
    return tuple(count_reward(vae, sizes, config.resolution, checkpointed, gradients) for checkpointed in ways)


@functools.cache
def count_reward(
    vae: str,
    clip: tuple[int, str] | None,
    resolution: int,
    checkpointed: bool = False,
    gradients: bool = True,
    pictures: int = 1,
) -> RewardLoad:
    """One call for so many pictures; `activation_bytes` and `flops` are those of all.

    Args:
        vae: its config.json.
        clip: parameters of the reward's CLIP model, and its vision tower's configuration as JSON.
    """
    shapes = json.loads(vae)
    counter = DeviceCounter()
    with torch.device("meta"), gpu_operators():
        decoder = _decoder(shapes)
        if checkpointed:
            decoder.enable_gradient_checkpointing()
        models = [decoder, *([_vision(json.loads(clip[1]))] if clip else [])]
        side = resolution // 2 ** (len(shapes["block_out_channels"]) - 1)
        latents = torch.empty(pictures, shapes["latent_channels"], side, side, requires_grad=gradients)
        held = [value for model in models for value in (*model.parameters(), *model.buffers())]
        with _REPLAY, Counting(counter), torch.set_grad_enabled(gradients):
            counter.hold([*held, latents], None)
            before = counter.current
            drawn = (decoder.decode(latents, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)
            scores = _score(models[1], drawn) if clip else drawn.flatten(1).mean(1)
            if gradients:
                torch.autograd.grad(scores.sum(), latents)
    parameters = sum(parameter.numel() for parameter in decoder.parameters()) + (clip[0] if clip else 0)
    blocks = sum(type(each).__name__ in BLOCKS for model in models for each in _launched(model))
    return RewardLoad(4 * parameters, counter.peak - before, counter.flops, checkpointed, blocks)


def _decoder(shapes: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(shapes).eval().requires_grad_(False)


def _vision(sizes: Mapping[str, Any]) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).eval().requires_grad_(False)


def _launched(model: Any) -> Iterator[nn.Module]:
    """Modules that run: of the VAE only the decoder's."""
    found: Iterator[nn.Module] = (model.decoder if hasattr(model, "decoder") else model).modules()
    return found


def _score(vision: Any, pictures: Tensor) -> Tensor:
    found: Tensor = vision(pixel_values=preprocess(pictures, vision.config.image_size)).image_embeds
    return found.sum(1)
