"""Tables of optimizer steps, of runs on a GPU, and of machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.report.markdown import command, device, gib, made_on, table, threads

Results = Sequence[dict[str, Any]]
_HEAD = ("date", "command", "machine", "versions", "sources")  # of a result file


def throughput(results: Results) -> str:
    """Seconds by phase and what becomes of them, a table a result file."""
    return "\n".join(_throughput_of(result) for result in results)


def _throughput_of(result: Mapping[str, Any]) -> str:
    ways = result["ways"]
    phases = list(dict.fromkeys(phase for way in ways for phase in way.get("seconds", {}) if phase != "total"))
    rows = []
    for way in ways:
        if "seconds" not in way:
            rows.append([way["way"], absence(way), *[""] * (len(phases) + 7)])
            continue
        seconds, faulty = way["seconds"], " (faulty)" if way.get("faults") else ""
        spread = "" if way.get("spread") is None else f" ± {50 * way['spread']:.0f} %"
        cells = [f"{way['way']}{faulty}", f"{_scaled(seconds['total'], 1, 2)}{spread}"]
        cells += [_scaled(seconds.get(phase), 1, 2) for phase in phases]
        cells += [f"{way['images_per_s']:.3g}", _scaled(way.get("flops_per_s"), 1e12, 1)]
        cells.append(_scaled(way.get("of_matmul"), 0.01, 0, " %"))
        movement = way.get("movement") or {}
        moved = [(way.get("copies") or movement).get(f"{direction}_bytes") for direction in ("h2d", "d2h")]
        cells.append(" + ".join(_scaled(number, 1e9, 1) for number in moved if number is not None))
        cells.append(_scaled(movement.get("overlap"), 0.01, 0, " %"))
        cells += [gib(way.get(f"{kind}_bytes")) for kind in ("peak_device", "planned_peak")]
        rows.append(cells)
    heads = [device(result), "s a step", *phases, "images/s", "TFLOP/s", "of a matrix product"]
    heads += ["GB to and from the device", "copies hidden", "peak device memory", "planned"]
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["settings"].items())
    text = f"{settings}; the matrix product of the same run reached "
    text += f"{_scaled(result['matmul_flops_per_s'], 1e12, 1)} TFLOP/s."
    if shorter := {way["way"]: way["steps"] for way in ways if way.get("steps", _steps(result)) != _steps(result)}:
        text += f" Rollout steps: {', '.join(f'{steps} in {way}' for way, steps in shorter.items())}."
    if faults := [
        f"{way['way']}: {', '.join(way['faults'])}" for way in ways if "seconds" in way and way.get("faults")
    ]:
        text += f" Faulty, and not in the figure: {'; '.join(faults)}."
    return f"{table(heads, rows)}\n{text} {command([result])}\n"


def _steps(result: Mapping[str, Any]) -> int | None:
    return result["settings"].get("steps")


def absence(way: Mapping[str, Any]) -> str:
    """Why a way has no seconds."""
    if "out_of_memory_bytes" in way:
        return f"out of memory at {gib(way['out_of_memory_bytes'], 0)}"
    return str(way.get("failed", way.get("refused", "not measured"))).partition("\n")[0].replace("|", "/")


def _scaled(value: float | None, unit: float, digits: int, suffix: str = "") -> str:
    """With so many digits; what is below one with two significant ones at least."""
    if value is None:
        return ""
    number = value / unit
    return f"{number:.{digits}f}{suffix}" if number == 0 or abs(number) >= 1 else f"{number:.2g}{suffix}"


def _where(result: Mapping[str, Any]) -> str:
    return str(result["machine"].get("gpu") or threads(result["machine"]))


def parts(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the stages of `bench gpu` measured, as results of `bench throughput`, `kernels` and `memory`."""
    if "stages" not in result:
        return
    head = {key: result[key] for key in _HEAD if key in result} | {"device": _gpu_name(result)}
    for name, stage in result["stages"].items():
        rows = stage.get("rows", [])
        ways = [row for row in rows if "way" in row]
        operations = [row for row in rows if "operation" in row]
        if ways:
            tasks = [row.get("task", {}) for row in ways]
            settings = {key: value for key, value in tasks[0].items() if all(t.get(key) == value for t in tasks)}
            matmul = next((row["matmul_flops_per_s"] for row in ways if "matmul_flops_per_s" in row), 0.0)
            yield {**head, "settings": {"stage": name, **settings}, "matmul_flops_per_s": matmul, "ways": ways}
        if operations:
            yield {**head, "operations": operations}
        yield from ({**head, **row} for row in rows if "lengths" in row)


def gpu(results: Results, *, short: bool = False) -> str:
    """The stages of `bench gpu`, a table a run; short: whether they passed."""
    return "\n".join(_gpu_run(result, short) for result in results)


def _gpu_run(result: Mapping[str, Any], short: bool) -> str:
    rows = []
    for name, stage in result["stages"].items():
        seconds = stage.get("seconds")
        found = [name, str(stage.get("status", "unfinished")), "" if seconds is None else f"{seconds:.0f}"]
        rows.append(found if short else [*found, _found(stage).replace("|", "/")])
    heads = [_gpu_name(result), "status", "s"] + ([] if short else [""])
    return f"{table(heads, rows)}\n{command([result])}\n"


def _found(stage: Mapping[str, Any]) -> str:
    """A stage's rows in words: how many passed, or its rates; and its error."""
    rows = stage.get("rows", [])
    words = []
    checks = [row for row in rows if "passed" in row]
    if checks:
        failed = [str(row["key"]) for row in checks if not row["passed"]]
        words.append(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
        words += [f"failed: {key}" for key in failed]
    elif any(key in row for row in rows for key in ("way", "operation", "lengths")):
        words.append(f"{len(rows)} rows, above")
    else:
        words += [f"{row['key']}: {', '.join(_rates(row))}" for row in rows]
    words += [f"{row['key']}: {fault}" for row in rows for fault in row.get("faults") or []]
    if stage.get("error"):
        words.append(str(stage["error"]).strip().splitlines()[-1])
    return "; ".join(words)


def _rates(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, float):
            yield f"{name.replace('_', ' ')} {_with_unit(name if 'flops' in name else 'bytes_per_s', value)}"


def _gpu_name(result: Mapping[str, Any]) -> str:
    return str((result.get("gpu") or {}).get("name") or _where(result))


# ---- machines ------------------------------------------------------------------------------------------------------


def doctor(results: Results) -> str:
    """What `leapalign doctor` measured, a table a machine."""
    return "\n".join(_doctor_on(result) for result in results)


def _doctor_on(result: Mapping[str, Any]) -> str:
    measured = [[key, value] for key, value in _flat(result["rates"])]
    presets = [[each["name"], each["text"].replace("|", "/")] for each in result["presets"]]
    heads = ["rate", threads(made_on(result)[0])]
    return f"{table(heads, measured)}\n{table(['preset', ''], presets, left=2)}\n{command([result])}\n"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, number with its unit) of all numbers and words in nested mappings."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name} ")
        elif isinstance(value, bool | str):
            yield name, str(value).partition("\n")[0][:120]
        elif isinstance(value, int | float):
            yield name, _with_unit(key if "per_s" in key or "bytes" in key else name, value)


def _with_unit(name: str, value: float) -> str:
    if "flops" in name:
        return f"{value / 1e12:.1f} TFLOP/s"
    if name.endswith("bytes"):
        return gib(value)
    if "bytes_per_s" in name or name.startswith(("copies ", "host ")):
        return f"{value / 1e9:.1f} GB/s"
    if "seconds" in name:
        return f"{value:.3g} s"
    return f"{value:.4g}"
