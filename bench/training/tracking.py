"""Does an 8-bit AdamW stay on float32's course for 1,000 steps? Flow matching on `shapes`, beside bitsandbytes.

The transformer of the embedded default learns the velocity of scenes (FLUX's training objective), every way from the
same weights on the same batches, noise and noise levels. What is compared, every tenth of the run:

    loss          on held-out scenes, minus float32's
    distance      of the weights from float32's, relative to the way that these have come

One way is float32 with half the microbatch: what only rounds differently goes apart as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from bench import record
from bench.training import optimizer_steps
from bench.training.optimizer_steps import Settings, Step
from leapalign.data.embeddings import embed_prompts
from leapalign.families.pipeline import load_pipeline
from leapalign.families.source import resolve_model
from leapalign.zoo.shapes.pretraining.train_flow import pack
from leapalign.zoo.shapes.prompts import sample_specs
from leapalign.zoo.shapes.scenes import render, sample_scenes

RESOLUTION = 32
SCENES, HELD_OUT, BATCH, LOOKS = 512, 128, 16, 10

WAYS: Mapping[str, Callable[[Mapping[str, Tensor], Settings], Step]] = {
    "float32": optimizer_steps.float32,
    "float32, half microbatch": optimizer_steps.float32,
    "bitsandbytes 8-bit, float32": optimizer_steps.bitsandbytes,
    "8-bit, float32": optimizer_steps.eight_bit_float32,
    "8-bit, bf16": optimizer_steps.eight_bit,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench tracking`."""
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of batches and noise (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", metavar="NAME", help="also write bench/results/NAME.json")


def run(options: argparse.Namespace, unknown: list[str]) -> int:
    """Train every way and print. Exit code 2 for wrong settings."""
    problem = None
    if unknown:
        problem = f"unknown argument {unknown[0]}; see --help"
    elif options.steps < LOOKS or options.steps % LOOKS:
        problem = f"steps={options.steps} must be a multiple of {LOOKS}"
    elif options.seeds < 1:
        problem = f"seeds={options.seeds} must be at least 1"
    if problem:
        print(f"bench tracking: error: {problem}", file=sys.stderr)
        return 2
    runs = [follow(seed, options.steps, options.learning_rate) for seed in range(options.seeds)]
    results = {"every": options.steps // LOOKS, "runs": runs, "summary": summarise(runs)}
    if options.output:
        given = ["--steps", str(options.steps), "--seeds", str(options.seeds)]
        given += ["--learning-rate", str(options.learning_rate)]
        record.write(options.output, ["tracking", *given, "--json"], results, seeds=range(options.seeds))
    print(json.dumps(results, indent=1) if options.json else table(results["summary"]))
    return 0


def follow(seed: int, steps: int, lr: float) -> dict[str, dict[str, list[float]]]:
    """{way: held-out losses and distances at every tenth of the run}; a way that is not installed is left out."""
    found: dict[str, dict[str, list[float]]] = {}
    weights: dict[str, list[Tensor]] = {}
    for name, way in WAYS.items():
        try:
            losses, weights[name] = _train(way, seed, steps, lr, microbatches=2 if "half" in name else 1)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        start, exact = weights["float32"][0], weights["float32"]
        distances = [
            float((mine - theirs).norm() / (theirs - start).norm())
            for mine, theirs in zip(weights[name][1:], exact[1:], strict=True)
        ]
        found[name] = {"losses": losses, "distances": distances}
        print(f"seed {seed}, {name}: loss {losses[0]:.5f} -> {losses[-1]:.5f}", file=sys.stderr, flush=True)
        if name != "float32":
            del weights[name]
    return found


def _train(
    way: Callable[[Mapping[str, Tensor], Settings], Step], seed: int, steps: int, lr: float, *, microbatches: int
) -> tuple[list[float], list[Tensor]]:
    """(held-out losses, flat weights) at the beginning and after every tenth."""
    problem = _Problem()
    parameters = dict(problem.transformer.named_parameters())
    with torch.no_grad():  # every way begins at numbers that bfloat16 has
        for parameter in parameters.values():
            parameter.copy_(parameter.bfloat16())
    step = way(parameters, Settings(lr, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    losses, weights = [problem.held_out()], [_flat(parameters)]
    for number in range(1, steps + 1):
        rows = torch.randint(SCENES, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *problem.data.shape[1:], generator=generator)
        sigma = torch.rand(BATCH, generator=generator)
        for part in torch.arange(BATCH).chunk(microbatches):
            (problem.loss(rows[part], noise[part], sigma[part]) * len(part) / BATCH).backward()
        step({name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}, number)
        problem.transformer.zero_grad(set_to_none=True)
        if number % (steps // LOOKS) == 0:
            losses.append(problem.held_out())
            weights.append(_flat(parameters))
    return losses, weights


class _Problem:
    """Scenes and their latents, the transformer, and its loss."""

    def __init__(self) -> None:
        pipeline = load_pipeline("shapes")
        generator = torch.Generator().manual_seed(0)
        specs, texts = sample_specs(SCENES + HELD_OUT, generator)
        images = render(sample_scenes(specs, generator)).float() / 127.5 - 1
        with torch.no_grad():
            means = pipeline.vae.encode(images).latent_dist.mean
        self.data = pack((means - (pipeline.vae.config.shift_factor or 0.0)) * pipeline.vae.config.scaling_factor)
        embeds = embed_prompts(resolve_model("shapes"), texts, max_sequence_length=9).batch(texts)
        self.conditioning = pipeline.conditioning(embeds, RESOLUTION, guidance_scale=1.0)
        self.transformer = pipeline.transformer.requires_grad_().train()
        self._noise = torch.randn(HELD_OUT, *self.data.shape[1:], generator=generator)

    def loss(self, rows: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Mean squared error of the velocity: x_sigma = (1 - sigma) data + sigma noise, towards noise - data."""
        data, conditioning = (
            self.data[rows],
            {name: value if name.endswith("_ids") else value[rows] for name, value in self.conditioning.items()},
        )
        latents = torch.lerp(data, noise, sigma[:, None, None])
        velocity = self.transformer(hidden_states=latents, timestep=sigma, **conditioning, return_dict=False)[0]
        return (velocity - (noise - data)).square().mean()

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on held-out scenes, always with the same noise."""
        sigma = (torch.arange(HELD_OUT) + 0.5) / HELD_OUT
        return float(self.loss(torch.arange(SCENES, SCENES + HELD_OUT), self._noise, sigma))


def _flat(parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters.values()]).clone()


def summarise(runs: list[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """By way: the gain in loss, its difference from float32's and the distance at the end; means over seeds.

    `spread` is the standard deviation over seeds of the difference, `largest_difference` the largest mean difference at
    any look.
    """
    found: dict[str, Any] = {}
    for name in runs[0]:
        differences = [
            [mine - exact for mine, exact in zip(run[name]["losses"], run["float32"]["losses"], strict=True)]
            for run in runs
        ]
        ends = [each[-1] for each in differences]
        found[name] = {
            "gain": mean(run[name]["losses"][0] - run[name]["losses"][-1] for run in runs),
            "difference": mean(ends),
            "spread": stdev(ends) if len(ends) > 1 else None,
            "largest_difference": max((mean(look) for look in zip(*differences, strict=True)), key=abs),
            "distance": mean(run[name]["distances"][-1] for run in runs),
        }
    return found


def table(summary: Mapping[str, Any]) -> str:
    """The summary as aligned text."""
    heads = f"{'gain in loss':>14}{'minus float32':>15}{'± seeds':>10}{'largest':>10}{'distance':>10}"
    lines = [f"{'':30}{heads}"]
    for name, row in summary.items():
        spread = "" if row["spread"] is None else f"{row['spread']:.6f}"
        lines.append(
            f"{name:30}{row['gain']:14.5f}{-row['difference'] + 0.0:15.6f}{spread:>10}"
            f"{row['largest_difference']:10.6f}{row['distance']:10.4f}"
        )
    return "\n".join(lines)
