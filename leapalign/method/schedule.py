"""The noise levels of a rollout: exactly those that the diffusers pipeline of the same scheduler would visit."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


def shifted_sigmas(
    scheduler: Any, num_steps: int, image_seq_len: int, *, spacing: Literal["flux", "sd3"] = "flux"
) -> Tensor:
    """The `num_steps` + 1 noise levels of diffusers' FluxPipeline or StableDiffusion3Pipeline, falling from 1 to 0.

    Both pipelines hand an even grid to the scheduler, which shifts it: by mu, a line in the packed sequence length,
    where its config says `use_dynamic_shifting` (FLUX.1-dev), else by the static `shift` (SD3.5: 3). The grids differ:
    FLUX's is 1 ... 1/num_steps, SD3's ends at the last training timestep (and so is shifted twice when it is static).

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler; it is not changed.
        num_steps: Euler steps of the rollout, at least 2 because LeapAlign needs two of them.
        image_seq_len: image tokens the transformer sees, (height / 16) * (width / 16) for FLUX.1.
        spacing: whose grid.

    Returns:
        (num_steps + 1,) float32 on the CPU.

    Raises:
        ValueError: fewer than 2 steps, a sequence length below 1, or a scheduler that gives no deterministic
            rollout from noise to data.
    """
    if num_steps < 2:
        raise ValueError(f"num_inference_steps={num_steps}: a rollout needs at least 2 steps")
    if image_seq_len < 1:
        raise ValueError(f"image_seq_len={image_seq_len}: a rollout needs at least 1 image token")
    if spacing not in ("flux", "sd3"):
        raise ValueError(f"spacing={spacing!r}: choose 'flux' or 'sd3'")
    _check_supported(scheduler)
    config = scheduler.config
    mu = shift_mu(config, image_seq_len) if config.use_dynamic_shifting else None
    own = copy.deepcopy(scheduler)  # set_timesteps keeps state, and the caller's may be in the middle of a loop
    if spacing == "flux":
        own.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    else:
        own.set_timesteps(num_steps, mu=mu)
    sigmas = torch.as_tensor(own.sigmas, dtype=torch.float32, device="cpu")
    if not (sigmas[1:] < sigmas[:-1]).all():  # false for NaN as well
        raise ValueError(
            f"scheduler gives noise levels that do not fall at image_seq_len={image_seq_len}: check its shift settings"
        )
    return sigmas


def shift_mu(config: Any, image_seq_len: int) -> float:
    """mu of the dynamic time shift: the line through the config's base and max points of (image_seq_len, shift).

    The order of operations is that of diffusers' `calculate_shift`, so that the sigmas agree in every bit.
    """
    base_length, max_length = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_length - base_length)
    return float(image_seq_len * slope + (base_shift - slope * base_length))


def _check_supported(scheduler: Any) -> None:
    names = [base.__name__ for base in type(scheduler).__mro__]
    if "FlowMatchEulerDiscreteScheduler" not in names:
        raise ValueError(f"scheduler {names[0]} is not supported: use FlowMatchEulerDiscreteScheduler")
    for key in ("invert_sigmas", "stochastic_sampling"):
        if scheduler.config.get(key):
            raise ValueError(f"scheduler config {key}=True is not supported: set it to False")
