"""Pictures of result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GIB = 2**30


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


def plot_trajectory(result: Mapping[str, Any]) -> Figure:
    """Peak memory against the number of differentiated steps, both logarithmic; a line a method.

    Args:
        result: of `bench memory --trajectory`; lengths that a method does not have are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lengths = result["lengths"]
    for method, peaks in result["peak_bytes"].items():
        points = [(at, peak / _GIB) for at, peak in zip(lengths, peaks, strict=True) if peak is not None]
        style = "--" if method.startswith("engine") else "-"
        axes.plot([at for at, _ in points], [peak for _, peak in points], style, marker="o", markersize=4, label=method)
    axes.set(xscale="log", yscale="log", xlabel="differentiated steps", ylabel="peak device memory, GiB")
    axes.set_xticks(lengths, [str(at) for at in lengths])
    axes.minorticks_off()
    axes.set_title(f"{result['model']}, {result['how']}")
    axes.legend(fontsize="small")
    return figure
