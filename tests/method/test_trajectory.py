"""The rollout is Euler's method, and it is the diffusers pipelines' sampling loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline

from leapalign.method.schedule import shifted_sigmas
from leapalign.method.trajectory import rollout

SIGMAS = torch.tensor([1.0, 0.8, 0.45, 0.2, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("microbatch", [None, 1, 2])
def test_euler_steps_by_hand(linear_flow: Any, microbatch: int | None) -> None:
    model = linear_flow()
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    pooled = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    keep = torch.tensor([[0, 3], [1, 2], [2, 0]])
    trajectory = rollout(model, {"pooled_projections": pooled}, noise, SIGMAS, keep=keep, microbatch=microbatch)
    a, b = model.a.detach(), model.b.detach()
    for sample in range(3):
        x = noise[sample]
        for i in range(4):
            assert torch.equal(trajectory.latents[0], noise)
            torch.testing.assert_close(trajectory.latents[i, sample], x, rtol=1e-14, atol=1e-14)
            v = torch.stack([a @ token + SIGMAS[i] * b + pooled[sample] for token in x])
            for slot in range(2):
                if keep[sample, slot] == i:
                    torch.testing.assert_close(trajectory.velocities[sample, slot], v, rtol=1e-13, atol=1e-13)
            x = x + (SIGMAS[i + 1] - SIGMAS[i]) * v
        torch.testing.assert_close(trajectory.final[sample], x, rtol=1e-13, atol=1e-13)
    assert torch.equal(trajectory.steps, keep)


def test_at_gathers_by_sample(linear_flow: Any) -> None:
    given = {"pooled_projections": torch.zeros(2, 4, dtype=torch.float64)}
    trajectory = rollout(linear_flow(), given, torch.ones(2, 3, 4, dtype=torch.float64), SIGMAS)
    there = trajectory.at(torch.tensor([3, 1]))
    assert torch.equal(there, torch.stack([trajectory.latents[3, 0], trajectory.latents[1, 1]]))
    assert torch.equal(trajectory.final, trajectory.latents[4])
    assert trajectory.velocities.shape == (2, 0, 3, 4)
    assert trajectory.steps.shape == (2, 0)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_latents_stay_float32_between_the_steps_of_a_bfloat16_model(
    family: str, make_transformer: Any, make_inputs: Any
) -> None:
    transformer = make_transformer(family, torch.bfloat16)
    noise, conditioning = make_inputs(family, 2)
    given = {name: value.to(torch.bfloat16) for name, value in conditioning.items()}
    trajectory = rollout(transformer, given, noise, SIGMAS, keep=torch.tensor([[0, 1], [0, 1]]))
    assert {trajectory.latents.dtype, trajectory.sigmas.dtype, trajectory.velocities.dtype} == {torch.float32}
    step = trajectory.latents[1] - trajectory.latents[0]
    expected = (trajectory.sigmas[1] - trajectory.sigmas[0]) * trajectory.velocities[:, 0]
    # one float32 rounding of a sum of size below 8; bfloat16 latents would be off by 2^-7
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-6)
    assert not trajectory.latents.requires_grad
    assert not trajectory.velocities.requires_grad


def test_flux_pipeline_samples_the_same_image_latents(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux-guidance")
    noise, conditioning = make_inputs("flux-guidance", 2)
    conditioning["guidance"] = torch.full((2,), 3.5)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = FluxPipeline(scheduler, None, None, None, None, None, transformer)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=conditioning["encoder_hidden_states"],
        pooled_prompt_embeds=conditioning["pooled_projections"],
        height=32,  # 2 x 3 packed tokens of 16 pixels
        width=48,
        num_inference_steps=4,
        guidance_scale=3.5,
        latents=noise,
        output_type="latent",
    ).images
    sigmas = shifted_sigmas(scheduler, 4, noise.shape[1])
    # The pipeline's timestep is (1000 sigma) / 1000, an ulp off; four steps of a network in float32 make 1e-5 of it.
    torch.testing.assert_close(rollout(transformer, conditioning, noise, sigmas).final, expected, rtol=1e-5, atol=1e-5)


def test_sd3_pipeline_samples_the_same_image_latents(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("sd3")
    noise, conditioning = make_inputs("sd3", 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = StableDiffusion3Pipeline(transformer, scheduler, *[None] * 7)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=conditioning["encoder_hidden_states"],
        pooled_prompt_embeds=conditioning["pooled_projections"],
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=1.0,  # no second, negative pass
        latents=noise,
        output_type="latent",
    ).images
    sigmas = shifted_sigmas(scheduler, 4, 6, spacing="sd3")
    torch.testing.assert_close(rollout(transformer, conditioning, noise, sigmas).final, expected, rtol=1e-5, atol=1e-5)
