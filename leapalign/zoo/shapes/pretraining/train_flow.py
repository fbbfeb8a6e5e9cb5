"""Stage 2 of pretraining: the flow transformer, jointly with its two text encoders, on the autoencoder's latents."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from leapalign.zoo.shapes import checker
from leapalign.zoo.shapes.pretraining.networks import (
    GUIDANCE,
    LATENT_CHANNELS,
    LATENT_SIZE,
    build_clip,
    build_scheduler,
    build_t5,
    build_transformer,
    tokenize,
)
from leapalign.zoo.shapes.pretraining.progress import Progress, load_state, save_state
from leapalign.zoo.shapes.pretraining.train_autoencoder import load_autoencoder, render_pool
from leapalign.zoo.shapes.prompts import validation_prompts
from leapalign.zoo.shapes.scenes import CATEGORIES

BATCH = 64
STEPS = 8_000
LEARNING_RATE = 1.5e-3
DECAY_FROM = 0.65  # share of the steps after which the learning rate falls linearly to 0
PROMPT_DROPOUT, DROPOUT_FROM = 0.1, 4000  # empty prompts in the second half: guidance needs the unconditional flow
EMA_DECAY = 0.997
POOL = 80_000  # encoded scenes
TIME_MEAN, TIME_STD = 0.6, 1.1  # logit-normal noise levels, leaning to high noise where the layout is decided


def pack(latents: Tensor) -> Tensor:
    """(B, 8, 8, 8) -> (B, 16, 32), FLUX's 2x2 packing."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor) -> Tensor:
    """The inverse of `pack`."""
    side = LATENT_SIZE // 2
    grid = tokens.view(len(tokens), side, side, LATENT_CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(len(tokens), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)


class TextToFlow(nn.Module):
    """Transformer and text encoders as one module: the velocity at packed latents for tokenised prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.t5, self.t5_tokenizer = build_t5()
        self.clip, self.clip_tokenizer = build_clip()
        side = torch.arange(LATENT_SIZE // 2)
        grid = torch.stack([torch.zeros(4, 4), *torch.meshgrid(side, side, indexing="ij")], -1)
        self.register_buffer("img_ids", grid.reshape(-1, 3).float(), persistent=False)
        self.register_buffer("txt_ids", torch.zeros(self.t5_tokenizer.model_max_length, 3), persistent=False)

    def forward(self, x: Tensor, t: Tensor, t5_ids: Tensor, clip_ids: Tensor, guidance: Tensor | None = None) -> Tensor:
        """x (B, 16, 32), t (B,) in [0, 1], token ids (B, L), guidance (B,) -> velocity (B, 16, 32)."""
        return self.transformer(
            hidden_states=x,
            timestep=t,
            guidance=torch.full_like(t, GUIDANCE) if guidance is None else guidance,
            encoder_hidden_states=self.t5(t5_ids).last_hidden_state,
            pooled_projections=self.clip(clip_ids).pooler_output,
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            return_dict=False,
        )[0]


class Average(nn.Module):
    """Exponential moving average of parameters, as a state that can be saved."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.values = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in parameters)

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], step: int) -> None:
        """Move towards `parameters`; the decay warms up over the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values), [p.detach() for p in parameters], 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the averages."""
        for target, value in zip(module.parameters(), self.values, strict=True):
            target.data.copy_(value)


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, work: Path, seed: int, device: str) -> dict[str, Tensor]:
    """Normalised packed latents (fp16) and token ids of the training scenes, made once and kept in `work`."""
    file = work / f"latents-{seed}.pt"
    if not file.exists():
        images, _, texts = render_pool(POOL, seed + 1)
        means = [vae.encode(b.to(device).float() / 127.5 - 1).latent_dist.mean.cpu() for b in images.split(250)]
        latents = (torch.cat(means) - vae.config.shift_factor) * vae.config.scaling_factor
        t5_tokenizer, clip_tokenizer = build_t5()[1], build_clip()[1]
        pool = {
            "latents": pack(latents).half(),
            "t5": tokenize(t5_tokenizer, texts),
            "clip": tokenize(clip_tokenizer, texts),
        }
        torch.save(pool, file)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def accuracy(
    model: TextToFlow,
    vae: AutoencoderKL,
    device: str,
    guidance: float = GUIDANCE,
    per_prompt: int = 2,
    steps: int = 12,
) -> dict[str, float]:
    """Rule-based accuracy on the held-out prompts by category and overall, from Euler samples with fixed noise."""
    prompts = validation_prompts() * per_prompt
    texts = [p["prompt"] for p in prompts]
    t5_ids, clip_ids = tokenize(model.t5_tokenizer, texts).to(device), tokenize(model.clip_tokenizer, texts).to(device)
    x = torch.randn(len(prompts), 16, 32, generator=torch.Generator().manual_seed(7)).to(device)
    scheduler = build_scheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=0.5)
    for now, then in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        t = now.expand(len(x)).to(device)
        x = x + (then - now) * model(x, t, t5_ids, clip_ids, torch.full_like(t, guidance))
    latents = unpack(x) / vae.config.scaling_factor + vae.config.shift_factor
    images = (vae.decode(latents).sample * 0.5 + 0.5).clamp(0, 1).cpu()
    right = checker.check(images, prompts).float()
    category = torch.tensor([CATEGORIES.index(p["category"]) for p in prompts])
    scores = {name: right[category == i].mean().item() for i, name in enumerate(CATEGORIES)}
    return {"overall": right.mean().item(), **scores}


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 300 steps, constant, then linear to 0 from DECAY_FROM on."""
    decay = min(1.0, (steps - step) / (steps * (1 - DECAY_FROM)))
    return LEARNING_RATE * min(1.0, (step + 1) / 300) * decay


def train(work: Path, seed: int, device: str, steps: int = STEPS) -> None:
    """Train (or go on training) the flow model; leaves `work`/flow.pt with weights, averages and optimizer."""
    vae = load_autoencoder(work, device)
    pool = encode_pool(vae, work, seed, device)
    torch.manual_seed(seed)
    model = TextToFlow().to(device)
    empty = tokenize(model.t5_tokenizer, [""]), tokenize(model.clip_tokenizer, [""])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    average = Average(model.parameters(), EMA_DECAY).to(device)
    state_file = work / "flow.pt"
    progress = Progress("flow", steps)
    start = load_state(state_file, model=model, optimizer=optimizer, average=average, progress=progress)
    velocity = torch.compile(model)  # 1.3 times as fast on a CPU; one minute to compile
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(pool["latents"]), (BATCH,), generator=generator)
        t = (TIME_MEAN + TIME_STD * torch.randn(BATCH, generator=generator)).sigmoid().to(device)
        data = pool["latents"][index].float().to(device)
        noise = torch.randn(data.shape, generator=generator).to(device)
        x = (1 - t[:, None, None]) * data + t[:, None, None] * noise
        dropped = (torch.rand(BATCH, 1, generator=generator) < PROMPT_DROPOUT) & (step >= DROPOUT_FROM)
        t5_ids = torch.where(dropped, empty[0], pool["t5"][index]).to(device)
        clip_ids = torch.where(dropped, empty[1], pool["clip"][index]).to(device)
        loss = F.mse_loss(velocity(x, t, t5_ids, clip_ids), noise - data)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model.parameters(), step)
        progress.show(step + 1, loss=loss.item(), norm=norm.item())
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            save_state(state_file, step + 1, model=model, optimizer=optimizer, average=average, progress=progress)
            averaged = TextToFlow().to(device)
            average.copy_to(averaged)
            scores = "  ".join(f"{k} {v:.2f}" for k, v in accuracy(averaged, vae, device).items())
            print(f"flow {step + 1}: accuracy {scores}", flush=True)
    assert math.isfinite(loss.item() if steps > start else 0.0)
