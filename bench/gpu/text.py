"""What `python -m bench gpu` found, in a short table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from bench.speed.throughput_text import told

Rows = Sequence[Mapping[str, Any]]


def table(result: Mapping[str, Any]) -> str:
    """Each stage with its state and a line or more of what it found."""
    gpu = result.get("gpu")
    lines = [f"{gpu['name']}, {gpu['bytes'] / 2**30:.1f} GiB" if gpu else "no GPU: toy sizes on the CPU"]
    for name, stage in result["stages"].items():
        head = f"{name:12}{stage.get('status', 'unfinished'):11}{stage.get('seconds', 0):7.1f} s  "
        words = _WORDS.get(name, _count)(stage["rows"]) if stage["rows"] else []
        error = str(stage.get("error") or "").strip().splitlines()
        for line in [*words, *error[-2:]] or [""]:
            lines.append((head + line).rstrip())
            head = " " * len(head)
    return "\n".join(lines)


def _count(rows: Rows) -> list[str]:
    return [f"{len(rows)} rows"]


def _checks(rows: Rows) -> list[str]:
    failed = [str(row["key"]) for row in rows if not row["passed"]]
    line = f"{len(rows) - len(failed)} of {len(rows)} checks passed"
    return [line, *(f"failed: {key}" for key in failed[:5])]


def _ceilings(rows: Rows) -> list[str]:
    found = {row["key"]: row for row in rows}
    lines = []
    if "matrix product" in found:
        lines.append(f"matrix product {found['matrix product']['flops_per_s'] / 1e12:.3g} TFLOP/s")
    if "copies" in found:
        rates = (found["copies"][name] / 1e9 for name in ("h2d", "d2h", "h2d_together", "d2h_together"))
        lines.append("GB/s in {:.3g}, out {:.3g}; together in {:.3g}, out {:.3g}".format(*rates))
    if "host" in found:
        host = found["host"]
        lines.append(f"GB/s of the host: copy {host['copy'] / 1e9:.3g}, update in place {host['in_place'] / 1e9:.3g}")
    return lines


def _steps(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        line = told(row)
        if "seconds" in row:
            line += f"; {row['steps']} rollout steps of {row['task']['batch']} images"
        ballast = row.get("ballast") or {}
        if ballast:
            line += f"; without ballast ({ballast['none']})" if "none" in ballast else "; with ballast"
        lines.append(line)
    return lines


def _kernels(rows: Rows) -> list[str]:
    def share(way: str) -> float:
        ways = [row.get("ways", {}).get(way, {}) for row in rows]  # a row may only say what went wrong
        found = [each["of_copy"] for each in ways if "of_copy" in each]
        return median(found) if found else float("nan")

    shares = ", ".join(f"{way} {100 * share(way):.0f} %" for way in ("leapalign", "torch.compile", "torch eager"))
    return [f"{len(rows)} operations; of a copy's bytes a second, median: {shares}"]


def _ways(rows: Rows) -> list[str]:
    return [told(row) for row in rows]


def _trajectory(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        steps, peaks = row["lengths"], row["peak_bytes"]
        at = [(n, peak) for n, peak in zip(steps, peaks["full_autograd"], strict=True) if peak is not None]
        graph = ", ".join(f"{peak / 2**30:.3g} GiB with {n}" for n, peak in (at[0], at[-1])) if at else "none fits"
        engine = [peak for peak in peaks["engine_paired"] if peak is not None]
        most = f"{max(engine) / 2**30:.3g} GiB at most" if engine else "none fits"
        lines.append(f"{row['model']}: differentiated steps in one graph {graph}; the engine {most}")
    return lines


_WORDS: dict[str, Callable[[Rows], list[str]]] = {
    "correctness": _checks,
    "ceilings": _ceilings,
    "step-24": _steps,
    "step-48": _steps,
    "kernels": _kernels,
    "throughput": _ways,
    "whole": _ways,
    "trajectory": _trajectory,
}
