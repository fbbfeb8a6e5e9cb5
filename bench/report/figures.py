"""Figures of the report: pure functions of result files.

A figure is drawn from `data`, which is taken from the results and is all that it shows. The PNG carries a digest of
that and of the code here, so that whether a picture is up to date can be told without drawing it again: other versions
of matplotlib give other bytes for the same picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import sources
from bench.report.markdown import GIB, device
from bench.report.memory_tables import METHODS
from bench.report.speed_tables import HOST_NAMES

Results = Sequence[Mapping[str, Any]]
Data = list[dict[str, Any]]  # a dictionary for each panel
_KEY = "Source"  # of the PNG's text
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")  # Okabe and Ito
_BAR = 0.6  # height, of 1


@dataclass(frozen=True)
class Figure:
    """What a picture shows and how.

    Attributes:
        name: of the file, without its ending.
        caption: says what is seen.
        data: of the results, a panel each; empty: nothing to show.
        draw: one panel on its axes.
    """

    name: str
    caption: str
    data: Callable[[Results], Data]
    draw: Callable[[Any, Mapping[str, Any]], None]

    def digest(self, data: Data) -> str:
        """Of what the picture is made of."""
        code = sources.digest(Path(__file__))
        return hashlib.sha256(json.dumps([self.name, data, code], sort_keys=True).encode()).hexdigest()[:16]


def is_current(path: Path, digest: str) -> bool:
    """Whether a picture is there that was drawn from this."""
    from PIL import Image

    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return bool(picture.info.get(_KEY) == digest)


def write(figure: Figure, data: Data, path: Path) -> None:
    """Draw all panels into a PNG without a date or version in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context({**style, "font.size": 9, "axes.prop_cycle": pyplot.cycler(color=_COLOURS)}):
        picture, axes = pyplot.subplots(len(data), figsize=(7.2, 3.8 * len(data)), layout="constrained", squeeze=False)
        for panel, each in zip(data, axes[:, 0], strict=True):
            figure.draw(each, panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, dpi=110, metadata={"Software": None, _KEY: figure.digest(data)})
        pyplot.close(picture)


# ---- memory --------------------------------------------------------------------------------------------------------


def _trajectory_data(results: Results) -> Data:
    return [
        {
            "title": ", ".join(result[key] for key in ("model", "how", "device") if key in result),
            "lengths": result["lengths"],
            "peaks": {METHODS.get(name, name): peaks for name, peaks in result["peak_bytes"].items()},
        }
        for result in results
    ]


def _draw_trajectory(axes: Any, panel: Mapping[str, Any]) -> None:
    most = max(peak for peaks in panel["peaks"].values() for peak in peaks if peak is not None)
    unit, name_of_unit = (GIB, "GiB") if most >= GIB else (2**20, "MiB")
    for name, peaks in panel["peaks"].items():
        points = [(n, peak / unit) for n, peak in zip(panel["lengths"], peaks, strict=True) if peak is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="differentiated steps", ylabel=f"peak {name_of_unit}")
    axes.set_xticks(panel["lengths"], labels=[str(n) for n in panel["lengths"]])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(panel["title"])
    axes.legend(fontsize=8)


def _resolution_data(results: Results) -> Data:
    """Of simulated steps, those that differ in resolution alone; and the axes of trajectory results."""
    panels: dict[str, dict[str, Any]] = {}
    for result in results:
        if "counted_peak_bytes" in result:
            s = result["settings"]
            legs = s["mode"] + (", recomputed" if s["recompute"] else "")
            line = f"weights resident: {s['resident']}, {legs}"
            title = f"{s['simulate']}, batch {s['batch']}, counted"
            point = [s["resolution"], result["counted_peak_bytes"]]
            panels.setdefault(title, {}).setdefault(line, []).append(point)
        elif "resolution" in result.get("axes", {}):
            axis = result["axes"]["resolution"]
            title = f"{result['model']}, {axis['length']} differentiated steps, {result['how']}"
            for name, peaks in axis["peak_bytes"].items():
                points = [[n, peak] for n, peak in zip(axis["values"], peaks, strict=True) if peak is not None]
                panels.setdefault(title, {})[METHODS.get(name, name)] = points
    found = []
    for title, lines in sorted(panels.items()):
        long = {name: sorted(points) for name, points in sorted(lines.items()) if len(points) > 1}
        if long:
            found.append({"title": title, "lines": long})
    return found


def _draw_resolution(axes: Any, panel: Mapping[str, Any]) -> None:
    ticks: set[int] = set()
    for name, points in panel["lines"].items():
        sides, peaks = zip(*points, strict=True)
        ticks.update(sides)
        axes.plot(sides, [peak / GIB for peak in peaks], marker="o", markersize=4, label=name)
    axes.set(xlabel="pixels a side", ylabel="peak GiB", title=panel["title"])
    axes.set_xticks(sorted(ticks))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


# ---- speed ---------------------------------------------------------------------------------------------------------


def _phases_data(results: Results) -> Data:
    panels = []
    for result in results:
        ways = {way["way"]: way["seconds"] for way in result["ways"] if "seconds" in way and not way.get("faults")}
        if ways:
            settings = result["settings"]
            of = settings.get("model") or settings.get("stage")
            panels.append({"title": f"{of} on {device(result)}" if of else device(result), "ways": ways})
    return panels


def _draw_phases(axes: Any, panel: Mapping[str, Any]) -> None:
    ways = panel["ways"]
    phases = dict.fromkeys(phase for seconds in ways.values() for phase in seconds if phase != "total")
    left = dict.fromkeys(ways, 0.0)
    for phase in phases:
        widths = [ways[way].get(phase, 0.0) for way in ways]
        axes.barh(list(ways), widths, left=list(left.values()), height=_BAR, label=phase)
        left = {way: left[way] + width for way, width in zip(ways, widths, strict=True)}
    axes.set(xlabel="seconds a step", title=panel["title"], ylim=(len(ways) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _roofline_data(results: Results) -> Data:
    panels = []
    for result in results:
        points: dict[str, list[list[float]]] = {}
        for row in result["operations"]:
            points.setdefault("a copy: the roof", []).append([row["moved_bytes"], row["copy"]["bytes_per_second"]])
            for way, found in row["ways"].items():
                if "absent" not in found:
                    points.setdefault(way, []).append([row["moved_bytes"], found["bytes_per_second"]])
        panels.append({"title": str(result["device"]), "points": {way: sorted(at) for way, at in points.items()}})
    return panels


def _draw_roofline(axes: Any, panel: Mapping[str, Any]) -> None:
    for way, points in panel["points"].items():
        moved, rates = zip(*points, strict=True)
        roof = way.endswith("the roof")
        style = {"color": "#000000", "linewidth": 1.2} if roof else {"marker": "o", "markersize": 4, "linestyle": ""}
        axes.plot([each / 1e6 for each in moved], [rate / 1e9 for rate in rates], label=way, **style)
    axes.set(xscale="log", xlabel="MB that the operation has to move", ylabel="GB/s", title=panel["title"])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _host_data(results: Results) -> Data:
    return [
        {
            "title": f"{result['machine']['cpu']}, {result['threads']} threads",
            "rates": {HOST_NAMES.get(n, n): rate for n, rate in result["mparams_per_s"].items() if rate is not None},
        }
        for result in results
    ]


def _draw_host(axes: Any, panel: Mapping[str, Any]) -> None:
    names, rates = list(panel["rates"]), list(panel["rates"].values())
    colours = [_COLOURS[0] if name.startswith("8-bit in C++") else _COLOURS[-1] for name in names]
    bars = axes.barh(names, rates, height=_BAR, color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set(xlabel="million parameters a second", title=panel["title"], ylim=(len(names) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")


TRAJECTORY = Figure(
    "memory-trajectory", "Peak memory against the number of differentiated steps.", _trajectory_data, _draw_trajectory
)
RESOLUTION = Figure("memory-resolution", "Peak memory against resolution.", _resolution_data, _draw_resolution)
PHASES = Figure("seconds-by-phase", "Seconds of an optimizer step by phase.", _phases_data, _draw_phases)
ROOFLINE = Figure(
    "kernels-roofline",
    "Bytes a second of every operation; all of them are bound by memory, so the roof is a copy of as many bytes.",
    _roofline_data,
    _draw_roofline,
)
HOST = Figure("host-optimizer", "Parameters a second of AdamW on the host.", _host_data, _draw_host)
