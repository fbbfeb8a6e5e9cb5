"""Tables of kernels, the host's optimizer, steps on a GPU, and machines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.markdown import command, gib, table, threads

Results = Sequence[dict[str, Any]]


# ---- kernels -------------------------------------------------------------------------------------------------------


def kernels_compiled(results: Results) -> str:
    """What the compiler makes of the Triton kernels, a row a family."""
    result = results[-1]
    rows = []
    for family, built in _families(result).items():
        registers = [each["registers"] for each in built]
        widths = [each["narrowest_streamed_bytes"] for each in built if each["narrowest_streamed_bytes"]]
        rows.append(
            [
                f"`{family}`",
                str(len(built)),
                f"{min(registers)} to {max(registers)}",
                str(max(each["spilled_bytes"] for each in built)),
                str(min(widths)),
            ]
        )
    heads = ["kernels", "binaries", "registers a thread", "spilled bytes", "narrowest access to a large array, bytes"]
    text = f"Compiled for {_architectures(result)}, every configuration of every kernel; no GPU is needed."
    return f"{table(heads, rows)}\n{text} {command([result])}\n"


def kernels_compiled_in_words(results: Results) -> str:
    """The same as a sentence."""
    result = results[-1]
    built = [each for family in _families(result).values() for each in family]
    spilled = max(each["spilled_bytes"] for each in built)
    narrowest = min(each["narrowest_streamed_bytes"] for each in built if each["narrowest_streamed_bytes"])
    return (
        f"{len(built)} binaries, every configuration of every kernel for {_architectures(result)}: "
        f"{f'at most {spilled} spilled bytes' if spilled else 'no register is spilled'}, and no access to a large "
        f"array is narrower than {narrowest} bytes. {command([result])}\n"
    )


def _families(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    families: dict[str, list[dict[str, Any]]] = {}
    for kernel in result["kernels"]:
        families.setdefault(re.split(r"[ .]", kernel["name"])[0], []).extend(kernel["built"].values())
    return families


def _architectures(result: Mapping[str, Any]) -> str:
    named = ", ".join(f"sm_{number}" for number in result["architectures"])
    return f"{named} with Triton {result['versions']['triton']}"


def kernels_timed(results: Results) -> str:
    """Bytes a second of every operation and way, a table a GPU."""
    return "\n".join(_timed_on(result) for result in results)


def _timed_on(result: Mapping[str, Any]) -> str:
    ways = list(dict.fromkeys(way for row in result["operations"] for way in row["ways"]))
    rows = []
    for row in result["operations"]:
        where = "" if row["resolution"] is None else f", {row['resolution']}²"
        cells = [f"{row['operation']} {row['dtype']}{where}", f"{row['moved_bytes'] / 1e6:.1f}"]
        cells.append(f"{row['copy']['bytes_per_second'] / 1e9:.0f}")
        for way in ways:
            found = row["ways"].get(way, {"absent": ""})
            absent = "absent" in found
            cells.append("" if absent else f"{found['bytes_per_second'] / 1e9:.0f} ({100 * found['of_copy']:.0f} %)")
        rows.append(cells)
    heads = [str(result["device"]), "MB moved", "copy, GB/s", *(f"{way}, GB/s" for way in ways)]
    text = "GB/s of the bytes that the operation has to move, and their share of what a copy of as many reaches."
    return f"{table(heads, rows)}\n{text} {command([result])}\n"


def kernels_timed_beside(results: Results) -> str:
    """Ours beside eager and compiled torch at the largest resolution, a table a GPU."""
    return "\n".join(_beside(result) for result in results)


def _beside(result: Mapping[str, Any]) -> str:
    largest = max((row["resolution"] for row in result["operations"] if row["resolution"]), default=None)
    rows = []
    for row in result["operations"]:
        ours = row["ways"]["leapalign"]
        if row["resolution"] not in (None, largest) or "absent" in ours:
            continue
        others = [row["ways"].get(way, {}).get("seconds") for way in ("torch eager", "torch.compile")]
        cells = [f"{row['operation']} {row['dtype']}", f"{ours['bytes_per_second'] / 1e9:.0f}"]
        cells.append(f"{100 * ours['of_copy']:.0f} %")
        rows.append([*cells, *("" if other is None else f"{other / ours['seconds']:.2f}" for other in others)])
    heads = [str(result["device"]), "GB/s", "of a copy", "times faster than eager", "than torch.compile"]
    where = "" if largest is None else f"At {largest}². "
    return f"{table(heads, rows)}\n{where}{command([result])}\n"


# ---- host ----------------------------------------------------------------------------------------------------------


def host_optimizer(results: Results) -> str:
    """Parameters a second of AdamWs on the host, a table a machine."""
    return "\n".join(_host_on(result) for result in results)


def host_optimizer_in_words(results: Results) -> str:
    """What the best instruction set reaches, a sentence a machine."""
    lines = []
    for result in results:
        rates = result["mparams_per_s"]
        name = next((isa for isa in ("avx512", "avx2", "scalar") if rates.get(isa)), None)
        if name is None or not rates.get("torch_fused_fp32"):
            continue
        lines.append(
            f"{HOST_NAMES[name]}: {rates[name]:.0f} million parameters a second, "
            f"{rates[name] / rates['torch_fused_fp32']:.2f} times torch's fused fp32 AdamW in the same run, with "
            f"{_threads(result)}. {command([result])}\n"
        )
    return "\n".join(lines)


def _threads(result: Mapping[str, Any]) -> str:
    return f"{result['threads']} thread{'s' * (result['threads'] > 1)} of {result['machine']['cpu']}"


def _host_on(result: Mapping[str, Any]) -> str:
    rates, fused = result["mparams_per_s"], result["mparams_per_s"].get("torch_fused_fp32")
    cores = result.get("cores_obtained", {})
    rows = []
    for name in dict.fromkeys([*rates, *result["gb_per_s"]]):
        rate, bandwidth = rates.get(name), result["gb_per_s"].get(name)
        cells = [HOST_NAMES.get(name, name.replace("_", " ")), "" if rate is None else f"{rate:.0f}"]
        cells.append("" if bandwidth is None else f"{bandwidth:.1f}")
        cells.append("" if rate is None or not fused else f"{rate / fused:.2f}")
        cells.append(f"{cores[name]:.2f}" if isinstance(cores, Mapping) and name in cores else "")
        if rate is not None or bandwidth is not None:
            rows.append(cells)
    text = f"{_threads(result)}, all in turn."
    if not isinstance(cores, Mapping):
        text += f" Cores obtained: {cores:.2f}."
    for name, reason in result.get("left_out", {}).items():
        text += f" Not measured: {name}, {reason.rstrip('.')}."
    heads = ["AdamW on the host", "million parameters/s", "GB/s", "of torch fused fp32", "cores obtained"]
    return f"{table(heads, rows)}\n{text} {command([result])}\n"


HOST_NAMES = {
    "avx512": "8-bit in C++, AVX-512",
    "avx2": "8-bit in C++, AVX2",
    "scalar": "8-bit in C++, scalar",
    "torch_reference": "8-bit in torch (the definition)",
    "torch_fused_fp32": "torch fused, fp32 weights",
    "torch_fused_bf16": "torch fused, bf16 weights",
    "bnb_adamw8bit": "bitsandbytes 8-bit, fp32 weights",
    "torchao_adamw8bit": "torchao 8-bit, fp32 weights",
    "copy": "a copy",
    "in_place_mix": "the 8-bit update's traffic without its arithmetic",
}


# ---- steps ---------------------------------------------------------------------------------------------------------


def throughput(results: Results) -> str:
    """Seconds by phase and what becomes of them, a table a result file."""
    return "\n".join(_throughput_of(result) for result in results)


def _throughput_of(result: Mapping[str, Any]) -> str:
    ways = result["ways"]
    phases = list(dict.fromkeys(phase for way in ways for phase in way.get("seconds", {}) if phase != "total"))
    rows = []
    for way in ways:
        if "seconds" not in way:
            rows.append([way["way"], absence(way), *[""] * (len(phases) + 6)])
            continue
        seconds = way["seconds"]
        spread = "" if way.get("spread") is None else f" ± {50 * way['spread']:.0f} %"
        cells = [way["way"], f"{seconds['total']:.2f}{spread}"]
        cells += [_scaled(seconds.get(phase), 1, 2) for phase in phases]
        cells += [f"{way['images_per_s']:.3g}", _scaled(way.get("flops_per_s"), 1e12, 1)]
        cells.append(_scaled(way.get("of_matmul"), 0.01, 0, " %"))
        movement = way.get("movement") or {}
        moved = [movement.get(f"{direction}_bytes") for direction in ("h2d", "d2h")]
        cells.append(" + ".join(_scaled(number, 1e9, 1) for number in moved if number is not None))
        cells.append(_scaled(movement.get("overlap"), 0.01, 0, " %"))
        cells.append(gib(way.get("peak_device_bytes")))
        rows.append(cells)
    heads = [str(result["device"]), "s a step", *phases, "images/s", "TFLOP/s", "of a matrix product"]
    heads += ["GB to and from the device", "copies hidden", "peak device memory"]
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["settings"].items())
    text = f"{settings}; the matrix product of the same run reached {result['matmul_flops_per_s'] / 1e12:.1f} TFLOP/s."
    return f"{table(heads, rows)}\n{text} {command([result])}\n"


def absence(way: Mapping[str, Any]) -> str:
    """Why a way has no seconds."""
    if "out_of_memory_bytes" in way:
        return f"out of memory at {gib(way['out_of_memory_bytes'], 0)}"
    return str(way.get("refused", "not measured")).partition("\n")[0].replace("|", "/")


def _scaled(value: float | None, unit: float, digits: int, suffix: str = "") -> str:
    return "" if value is None else f"{value / unit:.{digits}f}{suffix}"


def _where(result: Mapping[str, Any]) -> str:
    return str(result["machine"].get("gpu") or threads(result["machine"]))


def gpu(results: Results, *, short: bool = False) -> str:
    """The stages of `bench gpu`, a table a run; short: whether they passed."""
    return "\n".join(_gpu_run(result, 0 if short else _SHOWN) for result in results)


def _gpu_run(result: Mapping[str, Any], most: int) -> str:
    rows = []
    for name, stage in result["stages"].items():
        seconds = stage.get("seconds")
        numbers = {k: v for k, v in _flat(stage) if k not in ("status", "seconds")}
        words = "; ".join(f"{key} {value}" for key, value in list(numbers.items())[:most])
        rows.append([name, str(stage["status"]), "" if seconds is None else f"{seconds:.0f}", words.replace("|", "/")])
    return f"{table([_where(result), 'status', 's', ''], rows)}\n{command([result])}\n"


_SHOWN = 12  # numbers of a stage; the result file has all


# ---- machines ------------------------------------------------------------------------------------------------------


def doctor(results: Results) -> str:
    """What `leapalign doctor` measured, a table a machine."""
    return "\n".join(_doctor_on(result) for result in results)


def _doctor_on(result: Mapping[str, Any]) -> str:
    measured = [[key, value] for key, value in _flat(result["rates"])]
    presets = [
        [each["name"], "fits" if each["fits"] else "does not fit", each["text"].replace("|", "/")]
        for each in result.get("presets", [])
    ]
    return (
        f"{table(['rate', result['device']], measured)}\n"
        + (f"{table(['preset', '', ''], presets)}\n" if presets else "")
        + "Command: `leapalign doctor --json`.\n"
    )


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
