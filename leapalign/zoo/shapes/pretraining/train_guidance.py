"""Stage 3 of pretraining: guidance distillation, which gives the guidance input its meaning as in FLUX.1-dev.

The teacher is the flow stage's average, frozen. Classifier-free guidance with scale w asks it twice,
v = v_empty + w (v_prompt - v_empty); the student learns to answer the same in one pass from w as an input.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from leapalign.zoo.shapes.pretraining.networks import tokenize
from leapalign.zoo.shapes.pretraining.progress import Progress, load_state, save_state
from leapalign.zoo.shapes.pretraining.train_autoencoder import load_autoencoder
from leapalign.zoo.shapes.pretraining.train_flow import (
    EMA_DECAY,
    TIME_MEAN,
    TIME_STD,
    Average,
    TextToFlow,
    accuracy,
    encode_pool,
)

BATCH = 64
STEPS = 1200
LEARNING_RATE = 5e-4
SCALES = (1.0, 5.0)  # guidance scales are drawn uniformly from here


def load_average(work: Path, stage: str) -> TextToFlow:
    """The averaged model of a stage (`flow` or `guidance`). Raises FileNotFoundError where it has not run."""
    file = work / f"{stage}.pt"
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there; run the {stage} stage first")
    model = TextToFlow()
    average = Average(model.parameters(), decay=0.0)
    load_state(file, average=average)
    average.copy_to(model)
    return model


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 100 steps, a slow linear fall, and a ramp to 0 over the second half."""
    fall = 1 - 0.48 * step / steps
    return LEARNING_RATE * min(1.0, (step + 1) / 100) * fall * min(1.0, (steps - step) / (0.5 * steps))


def train(work: Path, seed: int, device: str, steps: int = STEPS) -> None:
    """Distil (or go on distilling) guidance; leaves `work`/guidance.pt with weights, averages and optimizer."""
    vae = load_autoencoder(work, device)
    pool = encode_pool(vae, work, seed, device)
    teacher = load_average(work, "flow").to(device).requires_grad_(False)
    student = load_average(work, "flow").to(device)
    empty = tokenize(student.t5_tokenizer, [""]), tokenize(student.clip_tokenizer, [""])
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0, fused=True)
    average = Average(student.parameters(), EMA_DECAY).to(device)
    state_file = work / "guidance.pt"
    progress = Progress("guidance", steps)
    start = load_state(state_file, model=student, optimizer=optimizer, average=average, progress=progress)
    guided, velocity = torch.compile(teacher), torch.compile(student)
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(pool["latents"]), (BATCH,), generator=generator)
        t = (TIME_MEAN + TIME_STD * torch.randn(BATCH, generator=generator)).sigmoid().to(device)
        data = pool["latents"][index].float().to(device)
        noise = torch.randn(data.shape, generator=generator).to(device)
        scale = (SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(BATCH, generator=generator)).to(device)
        x = (1 - t[:, None, None]) * data + t[:, None, None] * noise
        t5_ids, clip_ids = pool["t5"][index], pool["clip"][index]
        with torch.no_grad():
            pairs = zip((t5_ids, clip_ids), empty, strict=True)
            both = [torch.cat([ids, none.expand_as(ids)]).to(device) for ids, none in pairs]
            prompted, unprompted = guided(torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)
            target = unprompted + scale[:, None, None] * (prompted - unprompted)
        loss = F.mse_loss(velocity(x, t, t5_ids.to(device), clip_ids.to(device), scale), target)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update(student.parameters(), step)
        progress.show(step + 1, loss=loss.item(), norm=norm.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(state_file, step + 1, model=student, optimizer=optimizer, average=average, progress=progress)
            averaged = load_average(work, "guidance").to(device)
            for w in (1.0, 3.5):
                scores = "  ".join(f"{k} {v:.2f}" for k, v in accuracy(averaged, vae, device, guidance=w).items())
                print(f"guidance {step + 1}: at scale {w} accuracy {scores}", flush=True)
