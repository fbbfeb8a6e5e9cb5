"""Pictures of result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean


def draw_curves(
    curves: Mapping[str, Sequence[Sequence[float]]], path: Path, *, first_step: int, quantity: str, title: str
) -> None:
    """Each name's mean over seeds as a line, in the range of the seeds.

    Args:
        curves: {name: for every seed, the values by step}, all of one length.
        path: the picture; its ending decides the format.
        first_step: the step of the first value.
        quantity: what the values are.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, seeds in curves.items():
        columns = list(zip(*seeds, strict=True))
        steps = range(first_step, first_step + len(columns))
        (line,) = axes.plot(steps, [mean(column) for column in columns], label=name)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel=quantity, title=title)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
