"""Stage 1 of pretraining: the autoencoder, on rendered scenes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from leapalign.zoo.shapes import checker
from leapalign.zoo.shapes.pretraining.networks import build_autoencoder
from leapalign.zoo.shapes.pretraining.progress import Progress, load_state, save_state
from leapalign.zoo.shapes.prompts import sample_specs
from leapalign.zoo.shapes.scenes import Spec, render, sample_scenes

BATCH = 32
STEPS = 2500
LEARNING_RATE = 2e-3
KL_WEIGHT = 2e-6
POOL = 30_000  # rendered scenes; 30 seconds to make


def render_pool(count: int, seed: int) -> tuple[Tensor, list[Spec], list[str]]:
    """`count` pictures (uint8, (count, 3, 32, 32)) with the specs and prompts they satisfy; a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    images, specs, texts = [], [], []
    for start in range(0, count, 5000):
        chosen, words = sample_specs(min(5000, count - start), generator)
        images.append((render(sample_scenes(chosen, generator)) * 255).round().to(torch.uint8))
        specs += chosen
        texts += words
    return torch.cat(images), specs, texts


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 100 steps, a slow cosine, and a linear ramp to 0 over the last 40% of the steps."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step, 0.6 * steps) / (1.6 * steps)))
    return LEARNING_RATE * min(1.0, (step + 1) / 100) * cosine * min(1.0, (steps - step) / (0.4 * steps))


def train(work: Path, seed: int, device: str, steps: int = STEPS) -> None:
    """Train (or go on training) the autoencoder; leaves `work`/autoencoder.pt with weights and latent statistics."""
    images, specs, _ = render_pool(POOL, seed)
    torch.manual_seed(seed)
    vae = build_autoencoder().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    state_file = work / "autoencoder.pt"
    progress = Progress("autoencoder", steps)
    start = load_state(state_file, vae=vae, optimizer=optimizer, progress=progress)
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        x = images[torch.randint(len(images), (BATCH,), generator=generator)].to(device).float() / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        error = F.mse_loss(y, x)
        loss = error + 0.3 * F.l1_loss(y, x) + KL_WEIGHT * posterior.kl().mean()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.show(step + 1, loss=loss.item(), psnr=10 * math.log10(4 / error.item()))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(state_file, step + 1, vae=vae, optimizer=optimizer, progress=progress)
    report(vae, images[:2000], specs[:2000], device)


@torch.no_grad()
def report(vae: AutoencoderKL, images: Tensor, specs: list[Spec], device: str) -> None:
    """Print how many reconstructions (and originals) the rule-based checker finds right."""
    x = images.float() / 255
    y = torch.cat([vae.decode(vae.encode(b.to(device) * 2 - 1).latent_dist.mean).sample.cpu() for b in x.split(250)])
    metadata = [spec.to_json() for spec in specs]
    for name, pictures in (("rendered", x), ("reconstructed", (y * 0.5 + 0.5).clamp(0, 1))):
        print(f"checker on {name}: {checker.check(pictures, metadata).float().mean():.4f}", flush=True)


@torch.no_grad()
def load_autoencoder(work: Path, device: str) -> AutoencoderKL:
    """The trained autoencoder, frozen, with `scaling_factor` and `shift_factor` of its latents in the config.

    Raises FileNotFoundError where the autoencoder stage has not run.
    """
    file = work / "autoencoder.pt"
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there; run the autoencoder stage first")
    vae = build_autoencoder()
    load_state(file, vae=vae)
    vae = vae.requires_grad_(False).eval().to(device)
    images, _, _ = render_pool(2000, seed=3)
    latents = torch.cat([vae.encode(b.to(device).float() / 127.5 - 1).latent_dist.mean for b in images.split(250)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae
