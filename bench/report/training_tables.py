"""Tables of training runs on the embedded default: its quality, and optimizers beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.markdown import command, mean_and_error, table, threads

Results = Sequence[dict[str, Any]]
_LABELS = {"colour_entropy_bits": "colour entropy, bits", "accuracy": "rule-based accuracy", "reward": "learned reward"}
_MAIN = ("reward", "accuracy", "colour_entropy_bits")


def quality(results: Results, *, short: bool = False) -> str:
    """Before and after of aligning the embedded default; short: without the kinds of prompts."""
    result = results[-1]
    rows = []
    for name, row in result["summary"].items():
        if short and name not in _MAIN:
            continue
        scale, digits, unit = (1, 3, "") if name in ("reward", "colour_entropy_bits") else (100, 1, " %")
        cells = [f"{scale * row[k]['mean']:.{digits}f}{unit}" for k in ("before", "after")]
        error = scale * row["change"]["spread"] / len(result["seeds"]) ** 0.5
        change = f"{scale * row['change']['mean']:+.{digits}f} ± {error:.{digits}f}"
        rows.append([_LABELS.get(name, name.replace("_", " ")), *cells, change])
    seeds = result["seeds"]
    pictures = seeds[0]["before"]["prompts"] * seeds[0]["before"]["images_per_prompt"]
    seconds = sum(s["seconds"] for s in seeds) / len(seeds)
    text = (
        f"{len(seeds)} seeds, {seeds[0]['steps']} steps each, {pictures} pictures of held-out prompts a seed. Behind ± "
        f"is the standard error of the change over seeds. {seconds:.0f} s a seed, judging included, with "
        f"{threads(result['machine'])}."
    )
    return f"{table(['', 'before', 'after', 'change'], rows)}\n{text} {command([result])}\n"


def curves(results: Results, *, short: bool = False) -> str:
    """Whole training runs with the 8-bit optimizer beside float32; short: what they end with."""
    usable = [r for r in results if len(r["runs"]["float32"]) > 1 and all(r["validation"].values())]
    if not usable:  # one seed has no spread
        return ""
    result = usable[-1]
    summary, scores, runs = result["summary"], result["validation"], result["runs"]
    window, seeds = summary["window"], len(runs["float32"])
    heads = ["", f"reward, last {window} steps", "held-out reward", "accuracy, points"]
    if not short:
        heads += ["reward - float32's", "distance, last half", "within the spread"]
    rows = []
    for name, change in scores.items():
        row = summary[name]
        cells = [name, f"{row['end']:.3f}", mean_and_error(change["reward"]["change"], 1, 3)]
        cells.append(mean_and_error(change["accuracy"]["change"], 100, 1))
        if not short and name == "float32":
            cells += ["", "", ""]
        elif not short:
            cells += [mean_and_error(row["paired_difference"], 1, 4), f"{row['paired_distance']:.4f}"]
            cells.append(f"{100 * row['share_within']:.0f} % of steps, at most {row['largest_ratio']:.1f} spreads")
        rows.append(cells)
    steps = len(runs["float32"][0]["rewards"])
    text = (
        f"{seeds} seeds, {steps} steps each, with the same noise, pairs and prompts. Rewards are means of {window} "
        "steps; held-out ones and accuracy are changes by training; ± is the standard error over seeds."
        f"{_most_different(summary)}"
    )
    if not short:
        text += (
            " The spread is float32's standard deviation over seeds. Half the microbatch changes only the last bits of "
            "matrix products: its distance is what training makes of rounding."
        )
    return f"{table(heads, rows)}\n{text} {command([result])}\n"


def _most_different(summary: Mapping[str, Any]) -> str:
    """Which way's reward differs most from float32's, in standard errors."""
    found = {
        name: abs(row["paired_difference"]["mean"]) / row["paired_difference"]["standard_error"]
        for name, row in summary.items()
        if isinstance(row, Mapping) and row.get("paired_difference", {}).get("standard_error")
    }
    if not found:
        return ""
    name = max(found, key=lambda name: found[name])
    return f" Over all steps {name} differs most in reward from float32, by {found[name]:.1f} standard errors."


def optimizers(results: Results) -> str:
    """The reward of a fixed batch under three roundings."""
    result = results[-1]
    heads = ["", "gain in reward", "of float32's", "largest distance, spreads"]
    rows = [
        [
            name,
            f"{row['gain']:.4f} ± {row['spread']:.4f}",
            f"{100 * row['share_of_float32']:.1f} %",
            "" if name == "float32" else f"{row['largest_distance_in_spreads']:.2f}",
        ]
        for name, row in result["summary"].items()
    ]
    seeds = result["curves"]["float32"]
    text = (
        f"{len(seeds)} seeds, {len(seeds[0]) - 1} steps on one batch each, from the same bfloat16 weights; ± is the "
        "standard deviation over seeds, in which the distance of the mean gains over the second half is given, too. "
        "`nearest` keeps float32 moments and rounds bfloat16 weights to nearest: small updates are lost."
    )
    return f"{table(heads, rows)}\n{text} {command([result])}\n"


def tracking(results: Results) -> str:
    """A thousand steps of flow matching under 8-bit AdamWs."""
    result = results[-1]
    heads = ["", "gain in loss", "minus float32's", "largest difference", "distance of the weights"]
    rows = []
    for name, row in result["summary"].items():
        spread = "" if row["spread"] is None else f" ± {row['spread']:.6f}"
        cells = [f"{row['difference']:+.6f}{spread}", f"{row['largest_difference']:+.6f}", f"{row['distance']:.4f}"]
        rows.append([name, f"{row['gain']:.5f}", *(["", "", ""] if name == "float32" else cells)])
    looks, seeds = len(result["runs"][0]["float32"]["losses"]) - 1, len(result["runs"])
    deviation = "; ± is the standard deviation over seeds" if seeds > 1 else ""
    text = (
        f"{seeds} seed{'s' * (seeds > 1)}, {looks * result['every']} steps each; losses on held-out scenes{deviation}. "
        "The distance from float32's weights is relative to the way that these have come; that of bfloat16 weights has "
        "their rounding in it."
    )
    return f"{table(heads, rows)}\n{text} {command([result])}\n"
