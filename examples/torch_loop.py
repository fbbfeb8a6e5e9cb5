"""Full fine-tuning with the streamed engine in a plain torch loop: three lines to wrap, and nothing else changes.

The loop is ReFL's: the reward sees where one step of the model leads, and its gradient goes back through that step.
The model is the packaged `shapes` pipeline, so that this runs anywhere:

    python examples/torch_loop.py --vram 1GiB --ram 4GiB
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
from leapalign.method.draws import draw_noise
from leapalign.zoo.shapes.reward import load_shapes_reward

PROMPTS = ["a red circle", "two blue squares", "a green cross left of a yellow triangle", "a blue triangle"]
RESOLUTION, SIGMA = 32, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--vram", help="device memory, e.g. 24GiB; default: no limit")
    parser.add_argument("--ram", help="host memory, e.g. 64GiB; default: no limit")
    options = parser.parse_args()
    device = resolve_device("auto")
    pipeline, reward = load_pipeline("shapes"), load_shapes_reward(device)
    pipeline.vae.to(device)
    embeds = embed_prompts(resolve_model("shapes"), PROMPTS, max_sequence_length=9).batch(PROMPTS)
    conditioning = pipeline.conditioning(embeds, RESOLUTION, guidance_scale=1.0)
    noise = draw_noise(0, 0, range(len(PROMPTS)), pipeline.latent_shape(RESOLUTION))

    workload = Workload(len(PROMPTS), RESOLUTION, num_inference_steps=0, legs=1, dtype=torch.float32, clip="global")
    plan = plan_memory(pipeline.transformer, Budget(options.vram, options.ram), workload)
    model = StreamedModel(pipeline.transformer, plan, AdamW8bit(lr=options.lr), device=device)

    ones = torch.ones(len(PROMPTS))
    with torch.no_grad():  # a first step to the noise level at which the loop works
        start = noise + (SIGMA - 1) * model(hidden_states=noise, timestep=ones, **conditioning).sample
    for step in range(options.steps):
        velocity = model(hidden_states=start, timestep=SIGMA * ones, **conditioning).sample
        rewards = reward(pipeline.decode((start - SIGMA * velocity).to(device)), PROMPTS)
        (-rewards.mean()).backward()
        model.optimizer.step()
        model.optimizer.zero_grad()
        print(f"step {step + 1}: reward {rewards.mean().item():.4f}", flush=True)
    model.close()


if __name__ == "__main__":
    main()
