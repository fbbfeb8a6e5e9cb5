"""Tables of memory: a simulated step, against trajectory length, and what optimizers keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.report.markdown import command, gib, table

Results = Sequence[dict[str, Any]]
_RESIDENT = {"all": "all but modulation", "none": "two blocks"}
_QUOTED = (
    "leapalign AdamW8bit",
    "leapalign, 8-bit residual",
    "leapalign, float32 master",
    "leapalign, average (EMA)",
    "leapalign, global-norm clip",
    "torch AdamW, float32",
    "bitsandbytes AdamW8bit",
)
METHODS = {
    "full_autograd": "all steps in one graph",
    "full_checkpointed": "one graph, a checkpoint a block",
    "full_step_checkpointed": "one graph, a checkpoint a block and a step",
    "leapalign_one_graph": "LeapAlign as published, one graph",
    "engine_paired": "this engine, block inputs kept",
    "engine_held": "this engine, block inputs recomputed",
}


def simulated(results: Results, *, short: bool = False) -> str:
    """What `bench memory --simulate` counted, a row a result file; short: paired legs only."""
    ordered = sorted(
        (result for result in results if "counted_peak_bytes" in result and not (short and _is_variant(result))),
        key=lambda r: (
            r["settings"]["simulate"],
            r["settings"]["resolution"],
            str(r["settings"]["resident"]),
            r["counted_peak_bytes"],
        ),
    )
    if not ordered:
        return ""
    rows = []
    for result in ordered:
        settings = result["settings"]
        legs = settings["mode"] + (", block inputs recomputed" if settings["recompute"] else "")
        resident = _RESIDENT.get(str(settings["resident"]), f"{settings['resident']} blocks and two more")
        cells = [settings["simulate"], f"{settings['resolution']}²", str(settings["batch"]), resident, legs]
        cells += [gib(result["counted_peak_bytes"]), f"{result['forwards_per_image']:.2f}"]
        rows.append(cells)
    heads = ["model", "pixels", "images", "weights on the device", "legs", "peak device memory", "forwards an image"]
    billions = sorted({f"{r['settings']['simulate']} {r['parameters'] / 1e9:.1f}B" for r in ordered})
    microbatches = " and ".join(map(str, sorted({result["settings"]["microbatch"] for result in ordered})))
    text = (
        f"Counted on fake tensors, not measured on a GPU: {', '.join(billions)} parameters in bf16, "
        f"microbatch {microbatches}, optimizer on the host. CUDA's context, workspaces and "
        "fragmentation and the reward's phase are not in it."
    )
    made = f"First row: `{ordered[0]['command']}`." if short else command(ordered)
    return f"{table(heads, rows)}\n{text} {made}\n"


def _is_variant(result: dict[str, Any]) -> bool:
    settings = result["settings"]
    return settings["mode"] != "paired" or bool(settings["recompute"])


def trajectory(results: Results, *, short: bool = False) -> str:
    """Peak memory of every method at every number of differentiated steps, a table a model.

    Args:
        short: the largest model alone, of those that were measured on a GPU if there are any.
    """
    if short:
        results = [max(results, key=lambda result: (_on_gpu(result), _largest(result)))]
    return "\n".join(_trajectory_of(result, short) for result in sorted(results, key=_model))


def _on_gpu(result: dict[str, Any]) -> bool:
    return result.get("how") == "measured" and "device" in result


def _largest(result: dict[str, Any]) -> int:
    """Bytes, at any number of steps."""
    return max(filter(None, result["peak_bytes"]["full_autograd"]), default=0)


def _trajectory_of(result: dict[str, Any], short: bool) -> str:
    growth = {name.removeprefix("bytes_per_"): laws for name, laws in result["growth"].items() if "bytes_per_" in name}
    rows = [
        [METHODS.get(method, method), *(gib(peak, 2) for peak in peaks), _law(growth.get("step", {}).get(method))]
        for method, peaks in result["peak_bytes"].items()
    ]
    more = {unit: laws for unit, laws in growth.items() if unit != "step"}
    settings = result["settings"]
    size = ", ".join(
        f"{name} {settings[name]}" for name in ("batch", "resolution", "blocks", "steps") if name in settings
    )
    how = {"measured": "Measured on real tensors", "counted": "Counted on fake tensors, not measured on a GPU"}
    where = f" on {result['device']}" if "device" in result else ""
    text = f"{how.get(result.get('how', ''), 'Peak bytes')}{where}: {size}."
    flat = result["growth"].get("spread_over_lengths", {})
    if flat:
        named = (f"{100 * value:.1f} % ({METHODS.get(name, name)})" for name, value in flat.items())
        text += (
            f" From the shortest to the longest the engine's largest peak is above its smallest by {', '.join(named)}."
        )
    if "included" in result:
        text += f" Included: {result['included']}."
    heads = [_model(result), *(f"{length} step{'s' * (length > 1)}" for length in result["lengths"]), "a step more"]
    if not more or short:
        return f"{table(heads, rows)}\n{text} {command([result])}\n"
    others = [
        [METHODS.get(method, method), *(_law(laws.get(method)) for laws in more.values())]
        for method in result["peak_bytes"]
    ]
    along = table([f"{_model(result)}, two steps", *(f"{unit} more" for unit in more)], others)
    return f"{table(heads, rows)}\n{along}\n{text} {command([result])}\n"


def _law(line: dict[str, Any] | None) -> str:
    """Slope and how well the line fits."""
    if line is None:
        return ""
    sure = "" if line.get("r_squared") is None else f", R² {line['r_squared']:.4f}"
    return f"{line['slope'] / 2**20:+.2f} MiB{sure}"


def _model(result: dict[str, Any]) -> str:
    return str(result.get("model") or result["settings"].get("model", "model"))


def optimizer_states(results: Results, *, short: bool = False) -> str:
    """Bytes a parameter of weights, states and waiting gradients; short: of some."""
    result = results[-1]
    rows, missing = [], []
    for name, row in result["optimizers"].items():
        if short and name not in _QUOTED:
            continue
        if "absent" in row:
            missing.append(f"{name}: {row['absent'].rstrip('.')}")
            continue
        cells = [f"{row[kind]:.2f}" for kind in ("weights", "states", "gradients")]
        rows.append([name, *cells, f"{sum(row.values()):.2f}"])
    heads = ["bytes a parameter", "weights", "states", "gradients that wait", "sum"]
    versions = ", ".join(f"{name} {version}" for name, version in result["others"].items())
    text = (
        f"Summed over the storages that each holds after a step on {result['parameters'] / 1e6:.1f}M parameters of "
        f"FLUX's shapes; torch {result['versions']['torch']}, {versions}. Ours are in host memory."
    )
    if missing:
        text += f" Not measured: {'; '.join(missing)}."
    return f"{table(heads, rows)}\n{text} {command([result])}\n"
