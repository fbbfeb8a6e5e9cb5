"""What `python -m bench throughput` found, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leapalign.engine.memory.sizes import spell_bytes

_GIB = 2**30


def told(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    if "refused" in row:
        return f"{row['way']}: {row['refused']}"
    if "failed" in row:
        return f"{row['way']}: failed: {row['failed']}"
    if "out_of_memory_bytes" in row:
        return f"{row['way']}: out of memory at {spell_bytes(row['out_of_memory_bytes'])}"
    spread = f" ± {50 * row['spread']:.1f} %" if row["spread"] is not None else ""
    phases = ", ".join(f"{name} {value:.2f}" for name, value in row["seconds"].items() if name != "total")
    line = f"{row['way']}: {row['seconds']['total']:.2f} s{spread} ({phases}), {row['images_per_s']:.3g} images/s, "
    line += f"{row['flops_per_s'] / 1e12:.3g} TFLOP/s, {100 * row['of_matmul']:.1f} % of a matrix product's"
    if row["peak_device_bytes"] is not None:
        line += f"; peak {row['peak_device_bytes'] / _GIB:.2f} GiB"
    if row["microbatch"] is not None:
        line += f", {row['microbatch']} image{'s' * (row['microbatch'] > 1)} at once"
    return "; ".join([line, *(f"FAULT: {fault}" for fault in row.get("faults", ()))])


def table(result: Mapping[str, Any]) -> str:
    """Phases, rates and copies as aligned text."""
    settings, wanted = result["settings"], result["settings"]["steps"]
    lines = [f"{result['device']}: {', '.join(f'{name} {value}' for name, value in settings.items())}"]
    lines += [f"matrix product {result['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s", "", _line("seconds", _HEADS)]
    for row in result["ways"]:
        if "seconds" in row:
            lines.append(_line(row["way"], _cells(row)))
        else:
            lines.append(f"{row['way']:20}  {told(row).partition(': ')[2]}")
    lines += ["", "The plain way's reward is part of its graph, which stands under vjp."]
    shortened = [row for row in result["ways"] if row.get("steps", wanted) != wanted]
    return "\n".join([*lines, *(f"{row['way']}: a rollout of {row['steps']} steps only" for row in shortened)])


_HEADS = ("rollout", "reward", "vjp", "update", "step", "spread", "images/s", "TFLOP/s", "of matmul", "GiB in",
          "GiB out", "overlap", "peak GiB")  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    seconds, copies = row["seconds"], row.get("copies") or {}
    phases = [seconds.get("rollout"), seconds.get("reward"), seconds.get("vjp", seconds.get("graph"))]
    cells = [_cell(value) for value in (*phases, seconds["update"], seconds["total"])]
    cells += [_percent(row["spread"]), _cell(row["images_per_s"]), _cell(row["flops_per_s"] / 1e12)]
    cells.append(_percent(row["of_matmul"]))
    for count in (copies.get("h2d_bytes"), copies.get("d2h_bytes")):
        cells.append(_cell(None if count is None else count / _GIB))
    peak = row["peak_device_bytes"]
    cells.append(_percent(row["movement"]["overlap"] if row["movement"] else None))
    return [*cells, _cell(None if peak is None else peak / _GIB)]


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:20}" + "".join(f"{cell:>10}" for cell in cells)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
