"""What `python -m bench throughput` found, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leapalign.engine.sizes import spell_bytes

_GIB = 2**30


def told(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    if "refused" in row:
        return f"{row['way']}: {row['refused']}"
    if "out_of_memory_bytes" in row:
        return f"{row['way']}: out of memory at {spell_bytes(row['out_of_memory_bytes'])}"
    phases = ", ".join(f"{name} {value:.2f}" for name, value in row["seconds"].items() if name != "total")
    line = f"{row['way']}: {row['seconds']['total']:.2f} s ({phases}), {row['images_per_s']:.3g} images/s, "
    line += f"{row['flops_per_s'] / 1e12:.3g} TFLOP/s, {100 * row['of_matmul']:.1f} % of a matrix product's"
    if row["peak_device_bytes"] is not None:
        line += f"; peak {row['peak_device_bytes'] / _GIB:.2f} GiB"
    if row.get("over_plan"):
        line += f", more than planned in {', '.join(row['over_plan'])}"
    return line


def table(result: Mapping[str, Any]) -> str:
    """Phases, rates and copies as aligned text."""
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    lines = [f"{result['device']}: {settings}", f"matrix product {result['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s", ""]
    heads = ("rollout", "reward", "vjp", "update", "step", "images/s", "TFLOP/s", "of matmul", "GiB in", "GiB out",
             "overlap", "peak GiB")  # fmt: skip
    lines.append(f"{'seconds':20}" + "".join(f"{head:>10}" for head in heads))
    for row in result["ways"]:
        if "seconds" not in row:
            lines.append(f"{row['way']:20}  {told(row).partition(': ')[2]}")
            continue
        seconds, copies, movement = row["seconds"], row.get("copies"), row["movement"]
        cells = [_cell(seconds.get("rollout")), _cell(seconds.get("reward"))]
        cells += [_cell(seconds.get("vjp", seconds.get("graph"))), _cell(seconds["update"]), _cell(seconds["total"])]
        cells += [_cell(row["images_per_s"]), _cell(row["flops_per_s"] / 1e12), _cell(row["of_matmul"], "%")]
        cells += [_cell(copies[name] / _GIB if copies else None) for name in ("h2d_bytes", "d2h_bytes")]
        peak = row["peak_device_bytes"]
        cells += [_cell(movement["overlap"] if movement else None, "%"), _cell(peak and peak / _GIB)]
        lines.append(f"{row['way']:20}" + "".join(f"{cell:>10}" for cell in cells))
    lines += ["", "The plain way's reward is part of its graph, which stands under vjp."]
    shortened = [
        row for row in result["ways"] if row.get("steps", result["settings"]["steps"]) != result["settings"]["steps"]
    ]
    lines += [f"{row['way']}: a rollout of {row['steps']} steps only" for row in shortened]
    return "\n".join(lines)


def _cell(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if unit else f"{value:.3g}"
