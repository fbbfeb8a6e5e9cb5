"""Does the 8-bit optimizer train like float32? Reward curves of whole runs of the trainer on the embedded default.

Every seed is run once a way, with the preset's own learning rate and steps:

    float32                     AdamW with float32 moments, weights and arithmetic
    float32, half microbatch    the same, but for the last bits of its matrix products: the yardstick
    8-bit, bf16                 AdamW with 8-bit moments; bfloat16 weights rounded stochastically, bfloat16 arithmetic
    8-bit, bf16, residual       with 8 more bits of every weight
    float32, fused              blocks in the arithmetic of the fused kernels; without a GPU in their torch references
    8-bit, bf16, fused          the same in bfloat16

Training amplifies every difference, so two ways are told apart only by more than the second differs from the first.
Noise, pairs and prompts are functions of (seed, step, sample), so the runs of a seed are paired step by step. A curve
is the mean reward of each step's batch; batches differ, so it is smoothed by a moving mean. Further arguments are
settings of all runs, e.g. `--learning_rate 2e-4`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench import record
from bench.plots import draw_curves
from leapalign.config.loading import load_config
from leapalign.errors import UsageError
from leapalign.run.trainer import Trainer

BASELINE, YARDSTICK = "float32", "float32, half microbatch"
_8BIT = ["--optimizer", "adamw8bit", "--weight_dtype", "bf16", "--optimizer_device", "host"]
_FUSED = ["--kernels", "triton"]
WAYS = {
    BASELINE: ["--optimizer", "adamw"],
    YARDSTICK: ["--optimizer", "adamw"],
    "8-bit, bf16": _8BIT,
    "8-bit, bf16, residual": [*_8BIT, "--master", "residual"],
    "float32, fused": ["--optimizer", "adamw", *_FUSED],
    "8-bit, bf16, fused": [*_8BIT, *_FUSED],
}
# One mode and one arithmetic, whatever the machine: they round differently.
COMMON = ["--executor", "streamed", "--streamed_mode", "held", "--kernels", "torch"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench curves`."""
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps (default: the preset's)")
    parser.add_argument("--batch", type=int, default=None, help="samples a step (default: the preset's)")
    parser.add_argument(
        "--window", type=int, default=5, help="steps of the moving mean, at most the run's (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=None, help="runs go here and are gone on with (default: a temporary folder)"
    )
    parser.add_argument("--plot", type=Path, help="draw the curves of the result file into this picture; needs no run")
    parser.add_argument("--name", default="curves-shapes", help="result file's name (default: %(default)s)")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run all ways with all seeds and write the result file, or plot it. Exit code 2 for wrong settings."""
    if options.plot:
        plot(record.read(options.name), options.plot)
        print(f"wrote {options.plot}")
        return 0
    try:
        for option in ("seeds", "window"):
            if getattr(options, option) < 1:
                raise UsageError(f"--{option} {getattr(options, option)}: at least 1")
        with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as folder:
            runs = _all_runs(Path(folder), options, overrides)
    except (UsageError, ValueError) as error:
        print(f"bench curves: error: {error}", file=sys.stderr)
        return 2
    curves = {name: [one["rewards"] for one in seeds] for name, seeds in runs.items()}
    summary = summarise(curves, options.window)
    scores = {name: _scores(seeds) for name, seeds in runs.items()}
    path = record.write(
        options.name,
        _command(options, overrides),
        {"summary": summary, "validation": scores, "runs": runs},
        seeds=range(options.seeds),
    )
    print(f"\n{table(summary, scores)}\n\nwrote {path.name}")
    return 0


def _command(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    sizes = {"--steps": options.steps, "--batch": options.batch}
    chosen = [word for name, value in sizes.items() if value is not None for word in (name, str(value))]
    return ["curves", "--seeds", str(options.seeds), *chosen, "--window", str(options.window), *overrides]


def _all_runs(folder: Path, options: argparse.Namespace, overrides: list[str]) -> dict[str, list[dict[str, Any]]]:
    """{way: what `_one_run` found, seed by seed}."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for seed in range(options.seeds):
        for name in WAYS:
            found = _one_run(name, seed, folder, options, overrides)
            runs[name].append(found)
            rewards = found["rewards"]
            print(f"seed {seed}, {name}: {rewards[0]:.4f} -> {rewards[-1]:.4f}, {found['seconds']:.0f} s", flush=True)
    return runs


def _one_run(name: str, seed: int, folder: Path, options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Train, or go on where the folder holds a part; the reward by step, and the scores before and after.

    Raises:
        UsageError: settings that do not go, a run that was stopped, or a step that was left out: it has no reward.
    """
    own = folder / f"seed-{seed}-{re.sub('[^a-z0-9]+', '-', name)}"
    fixed = ["--seed", str(seed), "--output_dir", str(own), "--report_to", "[]"]
    if options.steps is not None:
        fixed += ["--max_train_steps", str(options.steps)]
    if options.batch is not None:
        fixed += ["--train_batch_size", str(options.batch)]
    if (own / "config.yaml").is_file():
        fixed += ["--resume_from_checkpoint", "latest"]
    config = load_config("shapes", [*COMMON, *WAYS[name], *overrides, *fixed])
    size = config.train_batch_size
    microbatch = -(-size // 2) if name == YARDSTICK else size  # not left to the plan, for it decides the last bits
    once = config.max_train_steps  # validation only at the start and the end
    config = config.model_copy(update={"microbatch": microbatch, "validation_steps": once})
    outcome = Trainer(config).run()
    if outcome.interrupted:
        raise UsageError(f"stopped in seed {seed}, {name}" + ("; the same command goes on" if options.folder else ""))
    rows = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    if skipped := [row["step"] for row in rows if row["skipped"]]:
        raise UsageError(f"seed {seed}, {name}: step {skipped[0]} has no finite gradient, so its curve has a gap")
    before, after = outcome.summary.before, outcome.summary.after
    return {
        "seed": seed,
        "seconds": round(sum(row["seconds"]["total"] for row in rows), 1),  # of training, judging left out
        "rewards": [row["reward"] for row in rows],
        "before": before.as_dict() if before else None,
        "after": after.as_dict() if after else None,
    }


def smooth(curve: list[float], window: int) -> list[float]:
    """Means of every `window` consecutive values; of all, if there are fewer."""
    window = min(window, len(curve))
    return [mean(curve[first : first + window]) for first in range(len(curve) - window + 1)]


def summarise(curves: dict[str, list[list[float]]], window: int) -> dict[str, Any]:
    """How far every way's curve is from float32's, in units of the seeds' spread.

    Args:
        curves: {way: for every seed, the reward by step}.
        window: of `smooth`.

    Returns:
        For every way its mean smoothed reward at the start and the end. For all but float32 also

        ratios: by smoothed step, |mean over seeds - float32's mean| / standard deviation over seeds of float32.
        largest_ratio, share_within: their maximum, and the share of steps where they are at most 1.
        largest_ratio_pooled: the largest distance over the root mean square of these deviations over the steps. A
            deviation of 3 seeds is itself uncertain by half, and the largest ratio mostly where it happens to be small.
        paired_difference: mean of (way - float32) over the steps, seed by seed; its mean and standard error over seeds.
        paired_distance: root mean square of (way - float32) over seeds and the last half of the smoothed steps; the
            yardstick's is what rounding alone has grown to by then.

        What needs a spread is None with one seed.
    """
    smoothed = {name: [smooth(curve, window) for curve in seeds] for name, seeds in curves.items()}
    means = {name: [mean(column) for column in zip(*seeds, strict=True)] for name, seeds in smoothed.items()}
    spreads = _spreads(smoothed[BASELINE])
    found: dict[str, Any] = {"window": min(window, len(curves[BASELINE][0]))}
    for name, seeds in curves.items():
        found[name] = {"start": means[name][0], "end": means[name][-1]}
        if name == BASELINE:
            continue
        distances = [abs(a - b) for a, b in zip(means[name], means[BASELINE], strict=True)]
        differences = [mean(a) - mean(b) for a, b in zip(seeds, curves[BASELINE], strict=True)]
        apart = [a - b for pair in zip(smoothed[name], smoothed[BASELINE], strict=True) for a, b in _last_half(*pair)]
        found[name]["paired_distance"] = math.sqrt(mean(value**2 for value in apart))
        found[name] |= {"ratios": None, "largest_ratio": None, "share_within": None, "largest_ratio_pooled": None}
        found[name]["paired_difference"] = {"by_seed": differences, **_estimate(differences)}
        if spreads:
            ratios = [distance / spread for distance, spread in zip(distances, spreads, strict=True)]
            found[name] |= {
                "ratios": ratios,
                "largest_ratio": max(ratios),
                "share_within": mean(ratio <= 1 for ratio in ratios),
                "largest_ratio_pooled": max(distances) / math.sqrt(mean(spread**2 for spread in spreads)),
            }
    return found


def _last_half(one: list[float], other: list[float]) -> list[tuple[float, float]]:
    return list(zip(one, other, strict=True))[len(one) // 2 :]


def _spreads(seeds: list[list[float]]) -> list[float]:
    """Standard deviation over seeds by step; nothing for one seed."""
    return [stdev(column) for column in zip(*seeds, strict=True)] if len(seeds) > 1 else []


def _estimate(values: list[float]) -> dict[str, float | None]:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "standard_error": error}


def _scores(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """{score: {before, after, change: mean and standard error over seeds}} of the validation prompts, if there are."""
    if any(one["before"] is None or one["after"] is None for one in seeds):
        return {}
    rows = {}
    for score in ("reward", "accuracy"):
        if score not in seeds[0]["after"]:
            continue
        before, after = ([one[when][score]["mean"] for one in seeds] for when in ("before", "after"))
        change = [a - b for a, b in zip(after, before, strict=True)]
        rows[score] = {"before": _estimate(before), "after": _estimate(after), "change": _estimate(change)}
    return rows


def table(summary: dict[str, Any], scores: dict[str, Any]) -> str:
    """Summary and validation scores as aligned text."""
    heads = f"{'start':>9}{'end':>9}{'largest ratio':>15}{'steps within':>14}{'paired difference':>22}{'distance':>10}"
    lines = [f"{'':26}{heads}"]
    for name in scores:
        row = summary[name]
        line = f"{name:26}{row['start']:9.4f}{row['end']:9.4f}"
        if name != BASELINE:
            ratio = f"{row['largest_ratio']:15.2f}{100 * row['share_within']:12.0f} %" if row["ratios"] else " " * 29
            line += f"{ratio}{_signed(row['paired_difference']):>22}{row['paired_distance']:10.4f}"
        lines.append(line)
    for name, found in scores.items():
        for score, row in found.items():
            ends = f"{row['before']['mean']:.4f} -> {row['after']['mean']:.4f}"
            lines.append(f"{name}, validation {score}: {ends}, {_signed(row['change'])}")
    return "\n".join(lines)


def _signed(value: dict[str, float | None]) -> str:
    error = "" if value["standard_error"] is None else f" ± {value['standard_error']:.4f}"
    return f"{value['mean']:+.4f}{error}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Mean smoothed reward of every way over the steps, with the range of the seeds."""
    window = result["summary"]["window"]
    curves = {name: [smooth(one["rewards"], window) for one in seeds] for name, seeds in result["runs"].items()}
    quantity = f"reward, mean of {window} steps"
    draw_curves(curves, path, first_step=window, quantity=quantity, title=result["command"])
