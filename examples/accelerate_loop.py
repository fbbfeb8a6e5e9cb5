"""The streamed engine under Hugging Face accelerate: `prepare`, `accumulate`, `clip_grad_norm_` and schedulers as ever.

The model's weights stay in host memory whatever accelerate's device; the packaged `shapes` pipeline runs anywhere:

    python examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator

from leapalign.data.embeddings import embed_prompts
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.planning.planner import plan_memory
from leapalign.engine.planning.workload import Budget, Workload
from leapalign.families.pipeline import load_pipeline
from leapalign.families.source import resolve_model
from leapalign.method.draws import draw_noise

PROMPTS = ["a red circle", "two blue squares", "a green cross left of a yellow triangle", "a blue triangle"]
RESOLUTION = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6, help="microsteps, two an optimizer step (default: %(default)s)")
    options = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    pipeline = load_pipeline("shapes")
    embeds = embed_prompts(resolve_model("shapes"), PROMPTS, max_sequence_length=9).batch(PROMPTS)
    conditioning = pipeline.conditioning(embeds, RESOLUTION, guidance_scale=1.0)
    target = draw_noise(0, 1, range(len(PROMPTS)), pipeline.latent_shape(RESOLUTION))

    workload = Workload(len(PROMPTS), RESOLUTION, num_inference_steps=0, legs=1, dtype=torch.float32, clip="global")
    plan = plan_memory(pipeline.transformer, Budget(), workload)
    model = StreamedModel(pipeline.transformer, plan, AdamW8bit(lr=1e-4), device=accelerator.device)

    scheduler = torch.optim.lr_scheduler.LambdaLR(model.optimizer, lambda step: min(1.0, (step + 1) / 2))
    prepared, optimizer, scheduler = accelerator.prepare(model, model.optimizer, scheduler)
    for step in range(options.steps):
        with accelerator.accumulate(prepared):
            noise = draw_noise(0, 2 + step, range(len(PROMPTS)), pipeline.latent_shape(RESOLUTION))
            timestep = torch.linspace(0.2, 0.8, len(PROMPTS))
            velocity = prepared(hidden_states=noise, timestep=timestep, return_dict=False, **conditioning)[0]
            loss = (velocity - target).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        rate = scheduler.get_last_lr()[0]
        accelerator.print(f"microstep {step + 1}: loss {loss.item():.4f}, next learning rate {rate:.1e}")
    model.close()


if __name__ == "__main__":
    main()
