"""Tables of kernels and of the optimizer on the host."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.markdown import command, table

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
    for row in [*result["operations"], *result.get("failed", ())]:
        text += "".join(
            f" {row['operation']} {row['dtype']} failed: {fault.rstrip('.')}." for fault in row.get("faults", ())
        )
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
        spread = result.get("spread", {}).get(name)
        cells.append("" if spread is None else f"{100 * spread:.0f} %")
        cells.append(f"{cores[name]:.2f}" if isinstance(cores, Mapping) and name in cores else "")
        if rate is not None or bandwidth is not None:
            rows.append(cells)
    text = f"{_threads(result)}, all in turn."
    if not isinstance(cores, Mapping):
        text += f" Cores obtained: {cores:.2f}."
    for name, reason in result.get("left_out", {}).items():
        text += f" Not measured: {name}, {reason.rstrip('.')}."
    heads = ["AdamW on the host", "million parameters/s", "GB/s", "of torch fused fp32", "spread", "cores obtained"]
    spread = "Spread: the middle half of the rounds, relative to the median."
    return f"{table(heads, rows)}\n{text} {spread} {command([result])}\n{_aims(result)}"


# what the 8-bit update is to reach: (which, beside what, at least so many times its rate)
_AIMS = (
    ("avx512", "torch_fused_fp32", 1.2),
    ("avx512", "bnb_adamw8bit", 30.0),
    ("avx512", "in_place_mix", 0.4),
    ("avx2", "torch_fused_fp32", 0.75),
)


def _aims(result: Mapping[str, Any]) -> str:
    """What was aimed at beside what is reached, a table; empty where none can be told."""
    rows = []
    for ours, other, least in _AIMS:
        rates = result["gb_per_s"] if other == "in_place_mix" else result["mparams_per_s"]
        if rates.get(ours) and rates.get(other):
            reached = rates[ours] / rates[other]
            told = [
                HOST_NAMES[ours],
                HOST_NAMES[other],
                f"{least:g}",
                f"{reached:.2f}",
                "yes" if reached >= least else "no",
            ]
            rows.append(told)
    return f"\n{table(['aim', 'times the rate of', 'at least', 'measured', 'reached'], rows)}" if rows else ""


HOST_NAMES = {
    "avx512": "8-bit in C++, AVX-512",
    "avx512bw": "8-bit in C++, AVX-512 without VBMI",
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
