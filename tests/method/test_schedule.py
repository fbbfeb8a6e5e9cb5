"""The noise levels are those of diffusers' own pipelines, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux import pipeline_flux
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3

from leapalign.method.schedule import shifted_sigmas

FLUX1_DEV = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
FLUX1_SCHNELL = {"use_dynamic_shifting": False, "shift": 1.0}
SD35 = {"use_dynamic_shifting": False, "shift": 3.0}
TERMINAL = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "base_image_seq_len": 16, "max_image_seq_len": 9000}


def flux_pipeline_sigmas(scheduler: Any, num_steps: int, image_seq_len: int) -> torch.Tensor:
    """The schedule lines of FluxPipeline.__call__."""
    config = scheduler.config
    mu = pipeline_flux.calculate_shift(
        image_seq_len, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    pipeline_flux.retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=sigmas, mu=mu)
    return scheduler.sigmas


def sd3_pipeline_sigmas(scheduler: Any, num_steps: int, image_seq_len: int) -> torch.Tensor:
    """The schedule lines of StableDiffusion3Pipeline.__call__."""
    config, given = scheduler.config, {}
    if config.use_dynamic_shifting:
        given["mu"] = pipeline_stable_diffusion_3.calculate_shift(
            image_seq_len, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
    pipeline_stable_diffusion_3.retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=None, **given)
    return scheduler.sigmas


@pytest.mark.parametrize("config", [FLUX1_DEV, FLUX1_SCHNELL, SD35, TERMINAL])
@pytest.mark.parametrize(("num_steps", "image_seq_len"), [(2, 16), (25, 1024), (25, 2025), (50, 4096)])
@pytest.mark.parametrize(("spacing", "expected"), [("flux", flux_pipeline_sigmas), ("sd3", sd3_pipeline_sigmas)])
def test_the_pipelines_sigmas(config: dict, num_steps: int, image_seq_len: int, spacing: Any, expected: Any) -> None:
    sigmas = shifted_sigmas(FlowMatchEulerDiscreteScheduler(**config), num_steps, image_seq_len, spacing=spacing)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert torch.equal(sigmas, expected(FlowMatchEulerDiscreteScheduler(**config), num_steps, image_seq_len))


def test_flux1_dev_at_512_by_hand() -> None:
    """1024 tokens: mu = 0.5 + 0.65 * 768 / 3840 = 0.63, and sigma = e^mu / (e^mu + 1/t - 1)."""
    sigmas = shifted_sigmas(FlowMatchEulerDiscreteScheduler(**FLUX1_DEV), 25, 1024)
    even = np.arange(25, 0, -1) / 25
    by_hand = np.exp(0.63) / (np.exp(0.63) + 1 / even - 1)
    np.testing.assert_allclose(sigmas[:-1].numpy(), by_hand, rtol=1e-6)  # a few float32 ulps


def test_the_callers_scheduler_is_not_touched() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX1_DEV)
    scheduler.set_timesteps(4, mu=0.7)
    before = scheduler.sigmas.clone()
    shifted_sigmas(scheduler, 25, 1024)
    assert torch.equal(scheduler.sigmas, before)


@pytest.mark.parametrize(
    ("scheduler", "num_steps", "tokens", "spacing", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), 1, 16, "flux", "num_inference_steps=1"),
        (FlowMatchEulerDiscreteScheduler(), 4, 0, "flux", "image_seq_len=0"),
        (FlowMatchEulerDiscreteScheduler(), 4, 16, "flux2", "spacing='flux2'"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 4, 16, "flux", "invert_sigmas"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 4, 16, "flux", "stochastic_sampling"),
        (FlowMatchEulerDiscreteScheduler(shift=0.0), 4, 16, "flux", "do not fall"),
        (EulerDiscreteScheduler(), 4, 16, "flux", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_refusals(scheduler: Any, num_steps: int, tokens: int, spacing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        shifted_sigmas(scheduler, num_steps, tokens, spacing=spacing)
    assert "\n" not in str(refusal.value)
