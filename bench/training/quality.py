"""Does alignment make pictures better? Aligns the embedded default over several seeds and judges held-out prompts.

Every seed is a whole run (other noise, other pairs, other prompt order) judged before and after with the same noise.
The reward is what training saw; the accuracy comes from the rule-based checker, which training never sees. Further
arguments are settings of the run, e.g. `--max_train_steps 40 --learning_rate 2e-4`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench import record
from leapalign.config.loading import load_config
from leapalign.errors import UsageError
from leapalign.evaluation.metrics import estimate
from leapalign.run.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench quality`."""
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (default: %(default)s)")
    parser.add_argument("--config", default="shapes", help="preset or YAML file (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, help="pictures a held-out prompt (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/bench-quality"), help="runs go here; finished are kept"
    )
    parser.add_argument("--name", default=None, help="result file's name (default: quality-CONFIG)")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Align, judge, print the table, write the result file. Exit code 2 for wrong settings."""
    try:
        seeds = [_one_seed(seed, options, overrides) for seed in range(options.seeds)]
    except (UsageError, ValueError) as error:
        print(f"bench quality: error: {error}")
        return 2
    summary = summarise(seeds)
    print(table(summary, len(seeds)))
    chosen = ["--seeds", str(options.seeds), "--config", options.config, "--images", str(options.images)]
    name = options.name or f"quality-{Path(options.config).stem}"
    result = {"summary": summary, "seeds": seeds}
    path = record.write(name, ["quality", *chosen, *overrides], result, seeds=range(options.seeds))
    print(f"\nwrote {path.name}")
    return 0


def _one_seed(seed: int, options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Run seed `seed`, or go on with it where its folder holds a part; returns scores before and after."""
    folder = options.folder / f"seed-{seed}"
    fixed = ["--seed", str(seed), "--output_dir", str(folder), "--validation_images_per_prompt", str(options.images)]
    if (folder / "config.yaml").is_file():
        fixed += ["--resume_from_checkpoint", "latest"]
    config = load_config(options.config, [*overrides, *fixed])
    began = time.perf_counter()
    outcome = Trainer(config).run()
    if outcome.interrupted:
        raise UsageError(f"stopped in seed {seed}; the same command goes on")
    before, after = outcome.summary.before, outcome.summary.after
    if not (before and after) or before.correct is None or after.correct is None:
        raise UsageError("validation_prompts must describe scenes that the checker can judge, e.g. shapes:validation")
    paired = estimate(after.correct.double() - before.correct.double())
    return {
        "seed": seed,
        "steps": config.max_train_steps,
        "seconds": round(time.perf_counter() - began, 1),
        "before": before.as_dict(),
        "after": after.as_dict(),
        "accuracy_change": {"mean": paired.mean, "standard_error": paired.error},
    }


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (standard deviation) over seeds of every score, and the change with its standard error.

    The change's standard error combines the seeds' own, which are those of paired differences over prompts; the
    spread of the change over seeds stands beside it.
    """
    rows: dict[str, Any] = {}
    names = ["reward", "accuracy", *seeds[0]["before"]["accuracy_by_category"], "colour_entropy_bits"]
    for name in names:
        before, after = ([_score(s[when], name) for s in seeds] for when in ("before", "after"))
        change = [a - b for a, b in zip(after, before, strict=True)]
        rows[name] = {"before": _spread(before), "after": _spread(after), "change": _spread(change)}
    errors = [s["accuracy_change"]["standard_error"] for s in seeds]
    pooled = math.sqrt(sum(e * e for e in errors)) / len(errors)
    rows["accuracy"]["change"]["standard_error"] = pooled
    rows["accuracy"]["change"]["in_standard_errors"] = rows["accuracy"]["change"]["mean"] / pooled if pooled else None
    return rows


def table(summary: dict[str, Any], count: int) -> str:
    """The summary as aligned text."""
    lines = [f"{'':20}{'before':>18}{'after':>18}{'change':>18}   (mean ± standard deviation over {count} seeds)"]
    for name, row in summary.items():
        scale, unit = (1, "") if name in ("reward", "colour_entropy_bits") else (100, " %")
        digits = 3 if scale == 1 else 1
        cells = [f"{scale * c['mean']:.{digits}f} ± {scale * c['spread']:.{digits}f}{unit}" for c in row.values()]
        lines.append(f"{name:20}" + "".join(f"{cell:>18}" for cell in cells))
    change = summary["accuracy"]["change"]
    lines.append(
        f"\naccuracy change {100 * change['mean']:+.1f} points, standard error {100 * change['standard_error']:.1f} "
        f"(paired over prompts): {change['in_standard_errors'] or 0:.1f} standard errors"
    )
    return "\n".join(lines)


def _score(scores: dict[str, Any], name: str) -> float:
    if name == "colour_entropy_bits":
        return float(scores[name])
    return float((scores[name] if name in scores else scores["accuracy_by_category"][name])["mean"])


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else 0.0}
