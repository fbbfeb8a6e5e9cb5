"""Supervised flow-matching fine-tune of all parameters of a diffusers transformer with the streamed engine.

x_sigma = (1 - sigma) data + sigma noise, and the model learns noise - data. The pictures are one batch of scenes, in
the latents of the packaged `shapes` pipeline:

    python examples/flow_matching.py
"""

from __future__ import annotations

import argparse

import torch

from leapalign.data.embeddings import embed_prompts
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.planning.planner import plan_memory
from leapalign.engine.planning.workload import Budget, Workload
from leapalign.families.pipeline import load_pipeline
from leapalign.families.source import resolve_device, resolve_model
from leapalign.zoo.shapes.pretraining.train_flow import pack
from leapalign.zoo.shapes.prompts import sample_specs
from leapalign.zoo.shapes.scenes import render, sample_scenes

BATCH, RESOLUTION = 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--vram", help="device memory, e.g. 24GiB; default: no limit")
    parser.add_argument("--ram", help="host memory, e.g. 64GiB; default: no limit")
    options = parser.parse_args()
    device, generator = resolve_device("auto"), torch.Generator().manual_seed(0)
    pipeline = load_pipeline("shapes")
    specs, texts = sample_specs(BATCH, generator)
    images = render(sample_scenes(specs, generator)).float() / 127.5 - 1
    with torch.no_grad():
        means = pipeline.vae.encode(images).latent_dist.mean
    data = pack((means - (pipeline.vae.config.shift_factor or 0.0)) * pipeline.vae.config.scaling_factor)
    embeds = embed_prompts(resolve_model("shapes"), texts, max_sequence_length=9).batch(texts)
    conditioning = pipeline.conditioning(embeds, RESOLUTION, guidance_scale=1.0)

    workload = Workload(BATCH, RESOLUTION, num_inference_steps=0, legs=1, dtype=torch.float32, clip="block", ema=True)
    plan = plan_memory(pipeline.transformer, Budget(options.vram, options.ram), workload)
    optimizer = AdamW8bit(lr=1e-4, clip="block", ema_decay=0.9, fused_backward=True)  # no gradient outlives its block
    model = StreamedModel(pipeline.transformer, plan, optimizer, device=device)

    sigma = (torch.arange(BATCH) + 0.5) / BATCH
    for step in range(options.steps):
        noise = torch.randn(data.shape, generator=generator)
        latents = torch.lerp(data, noise, sigma[:, None, None])
        velocity = model(hidden_states=latents, timestep=sigma, **conditioning).sample
        loss = (velocity - (noise - data)).square().mean()
        loss.backward()
        model.optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.4f}, gradient norm {model.optimizer.gradient_norm:.3f}", flush=True)
    model.close()


if __name__ == "__main__":
    main()
