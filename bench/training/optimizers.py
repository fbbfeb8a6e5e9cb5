"""Do 8-bit moments and bfloat16 weights learn like float32? The reward of one fixed batch under three optimizers.

The embedded default is aligned on the same prompts and noise at every step, so that the reward's course shows the
optimizer and not the batch. All start from the same bfloat16 weights and see exact float32 gradients; they differ in
what they keep:

    float32               AdamW with float32 moments and weights
    8-bit, stochastic     8-bit moments, bfloat16 weights rounded stochastically (kernels/adamw8bit/definition.py)
    nearest               float32 moments, bfloat16 weights rounded to nearest
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from bench import record
from bench.plots import draw_curves
from bench.training import optimizer_steps
from bench.training.optimizer_steps import Settings, Step
from leapalign.config.keys import AlignConfig
from leapalign.config.loading import load_config
from leapalign.data.prompts import load_prompts
from leapalign.families.pipeline import FlowPipeline, load_pipeline
from leapalign.gradients import alignment_gradients
from leapalign.method.draws import draw_noise, draw_prompts, draw_steps
from leapalign.method.leapalign import LeapAlign
from leapalign.planning.configured import configured_reward, prompt_store
from leapalign.rewards.latent import LatentReward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench optimizers`."""
    parser.add_argument("--seeds", type=int, default=3, help="number of batches (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples of the fixed batch (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="(default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the curves of the result file into this picture; needs no run")
    parser.add_argument("--name", default="optimizers-shapes", help="result file's name (default: %(default)s)")


def run(options: argparse.Namespace, unknown: list[str]) -> int:
    """Run all curves and write the result file, or plot it. Exit code 2 for wrong settings."""
    if unknown:
        print(f"bench optimizers: error: unknown argument {unknown[0]}; see --help", file=sys.stderr)
        return 2
    if options.plot:
        plot(record.read(options.name), options.plot)
        print(f"wrote {options.plot}")
        return 0
    curves: dict[str, list[list[float]]] = {name: [] for name in OPTIMIZERS}
    for seed in range(options.seeds):
        for name in OPTIMIZERS:
            curves[name].append(curve(name, seed, options))
            print(f"seed {seed}, {name}: {curves[name][-1][0]:.4f} -> {curves[name][-1][-1]:.4f}", flush=True)
    chosen = ["--seeds", str(options.seeds), "--steps", str(options.steps), "--batch", str(options.batch)]
    chosen += ["--learning-rate", str(options.learning_rate)]
    result = {"curves": curves, "summary": summarise(curves)}
    path = record.write(options.name, ["optimizers", *chosen], result, seeds=range(options.seeds))
    print(f"\n{table(result['summary'])}\n\nwrote {path.name}")
    return 0


def curve(name: str, seed: int, options: argparse.Namespace) -> list[float]:
    """The fixed batch's mean reward before each step and after the last."""
    config = load_config("shapes", ["--seed", str(seed), "--train_batch_size", str(options.batch)])
    prompts = [prompt.text for prompt in load_prompts(config.train_prompts, key="train_prompts")]
    texts = [prompts[index] for index in draw_prompts(seed, 0, options.batch, len(prompts))]
    pipeline = load_pipeline(config.pretrained_model_name_or_path)
    reward = LatentReward(pipeline, configured_reward(config), texts)
    embeds = prompt_store(config, texts).batch(texts)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.copy_(parameter.bfloat16())
    parameters = dict(pipeline.transformer.named_parameters())
    step = OPTIMIZERS[name](parameters, _settings(options.learning_rate, config))
    rewards = []
    for number in range(options.steps + 1):
        found, grads = _gradients(pipeline, embeds, reward, config, number)
        rewards.append(found)
        if number < options.steps:
            norm = torch.nn.utils.get_total_norm(grads.values())
            torch._foreach_mul_(list(grads.values()), min(1.0, config.max_grad_norm / float(norm)))
            step(grads, number + 1)
    return rewards


def _gradients(
    pipeline: FlowPipeline, embeds: dict[str, Tensor], reward: LatentReward, config: AlignConfig, step: int
) -> tuple[float, dict[str, Tensor]]:
    """(mean reward, gradients) on the seed's prompts and noise, with this step's pairs."""
    samples = range(config.train_batch_size)
    result = alignment_gradients(
        pipeline.transformer,
        pipeline.conditioning(embeds, config.resolution, config.guidance_scale),
        draw_noise(config.seed, 0, samples, pipeline.latent_shape(config.resolution)),
        pipeline.sigmas(config.num_inference_steps, config.resolution),
        reward,
        LeapAlign(config.alpha, config.tau, config.threshold),
        pairs=draw_steps(LeapAlign(), config.seed, step, samples, config.num_inference_steps),
    )
    return float(result.rewards.mean()), result.grads


OPTIMIZERS: Mapping[str, Callable[[Mapping[str, Tensor], Settings], Step]] = {
    "float32": optimizer_steps.float32,
    "8-bit, stochastic": optimizer_steps.eight_bit,
    "nearest": optimizer_steps.nearest,
}


def _settings(lr: float, config: AlignConfig) -> Settings:
    return Settings(
        lr, config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.adam_weight_decay, config.seed
    )


def summarise(curves: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Gain of every optimizer, and its distance from float32's curve in units of the seeds' spread.

    The spread is the standard deviation over seeds of float32's gain at the step; the distance is the largest over the
    steps' second half (before, every gain is next to nothing) of the difference between mean gains.
    """
    gains = {name: [[r - seed[0] for r in seed] for seed in seeds] for name, seeds in curves.items()}
    steps = range(len(gains["float32"][0]))
    exact = [[seed[i] for seed in gains["float32"]] for i in steps]
    found: dict[str, Any] = {}
    for name, seeds in gains.items():
        final = [seed[-1] for seed in seeds]
        distances = [
            abs(mean(seed[i] for seed in seeds) - mean(exact[i])) / (stdev(exact[i]) if len(exact[i]) > 1 else 1.0)
            for i in list(steps)[len(steps) // 2 :]
        ]
        found[name] = {
            "gain": mean(final),
            "spread": stdev(final) if len(final) > 1 else 0.0,
            "share_of_float32": mean(final) / mean(exact[-1]),
            "largest_distance_in_spreads": max(distances),
        }
    return found


def table(summary: dict[str, Any]) -> str:
    """The summary as aligned text."""
    lines = [f"{'':20}{'gain':>10}{'± seeds':>10}{'of float32':>12}{'distance / spread':>20}"]
    for name, row in summary.items():
        cells = f"{row['gain']:10.4f}{row['spread']:10.4f}{100 * row['share_of_float32']:11.1f}%"
        lines.append(f"{name:20}{cells}{row['largest_distance_in_spreads']:20.2f}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Mean gain of every optimizer over the steps, with the range of the seeds."""
    gains = {
        name: [[reward - seed[0] for reward in seed] for seed in seeds] for name, seeds in result["curves"].items()
    }
    draw_curves(gains, path, first_step=0, quantity="gain in reward on a fixed batch", title=result["command"])
