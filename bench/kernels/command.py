"""The Triton kernels: what they are compiled to for every GPU, without one; and how fast they are on the one here.

With --compile-only: registers, spills, shared memory and width of access of every kernel in every configuration. It
fails if one spills or moves less than 16 bytes at once of what it streams: bench/kernels/compilation.py.

Else: bytes a second of every operation beside other ways to it, and their share of what a plain copy of as many bytes
reaches in the same run: bench/kernels/cases.py, bench/kernels/optimizer_cases.py and, for how, bench/kernels/timing.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

from bench import record
from bench.kernels import cases as kernel_cases
from bench.kernels import compilation as kernel_compilation
from bench.kernels import optimizer_cases
from bench.kernels.cases import Case, Shapes, Tensors
from bench.kernels.compilation import ARCHITECTURES, Compiled
from bench.kernels.timing import Call, sets_of_inputs, timed

_REPEATS = 50
SEED = 0  # of the inputs
_TINY = {"heads": 2, "head_dim": 32, "text": 8, "channels": 16, "samples": 2, "parameters": 8192}
_OTHERS = ("liger_kernel", "bitsandbytes", "torchao", "flashoptim")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench kernels`."""
    parser.add_argument("--compile-only", action="store_true", help="compile for --arch; no GPU is needed")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="CC")
    parser.add_argument("--only", metavar="NAME", help="kernels or operations with this in their name")
    parser.add_argument("--resolution", type=int, nargs="+", default=[512, 720, 1024], help="pixels a side")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: what is measured means nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")


def run(options: argparse.Namespace, unknown: list[str]) -> int:
    """Compile or measure. Exit code 1 for a kernel that the gate stops or that fails, 2 for wrong settings, no GPU."""
    try:
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]}; see --help")
        if options.json and (options.json.suffix != ".json" or not options.json.parent.is_dir()):
            raise ValueError(f"json={options.json}: give a file NAME.json in a folder that is there")
        if options.compile_only:
            return _compile(options)
        if not options.tiny and not torch.cuda.is_available():
            raise ValueError("needs a CUDA GPU; --compile-only works without, --tiny on the CPU with toy sizes")
        return _measure(options)
    except ValueError as error:
        print(f"bench kernels: error: {error}", file=sys.stderr)
        return 2


# ---- compiling -----------------------------------------------------------------------------------------------------


def _compile(options: argparse.Namespace) -> int:
    wanted = kernel_compilation.listed(options.only)
    if not wanted:
        raise ValueError(f"only={options.only} is in no kernel's name, or there is no Triton here")
    print(f"{len(wanted)} kernels: registers/spilled bytes a thread/shared bytes a program, by architecture\n")
    rows, faults = [], []
    for results in kernel_compilation.compile_all(wanted, options.arch):
        rows.append(_row(results))
        for result in results:
            faults += [f"{result.name}, sm_{result.arch}: {'; '.join(result.faults())}"] if result.faults() else []
        cells = (f"{r.arch}: {r.registers}/{r.spilled}/{r.shared}".ljust(18) for r in results)
        print(f"{results[0].name:58}{_widths(results):>22}  {''.join(cells)}".rstrip(), flush=True)
    for fault in faults:
        print(f"fails: {fault}")
    print(f"\n{len(wanted)} kernels for {len(options.arch)} architectures, {len(faults)} fail")
    _write(options, {"architectures": options.arch, "kernels": rows, "faults": faults})
    return 1 if faults else 0


def _widths(results: Sequence[Compiled]) -> str:
    """Widest access, and narrowest one to a streamed array, on any of the architectures."""
    streamed = [result.narrowest_streamed for result in results]
    narrowest = [width for width in streamed if width is not None]
    least = f"all streams {min(narrowest)} B" if narrowest else "streams nothing"
    return f"{max(result.widest for result in results)} B, {least}"


def _row(results: Sequence[Compiled]) -> dict[str, Any]:
    built = {
        f"sm_{result.arch}": {
            "registers": result.registers,
            "spilled_bytes": result.spilled,
            "shared_bytes": result.shared,
            "widest_access_bytes": result.widest,
            "narrowest_streamed_bytes": result.narrowest_streamed,
        }
        for result in results
    }
    return {"name": results[0].name, "unstreamed": list(results[0].unstreamed), "built": built}


# ---- measuring -----------------------------------------------------------------------------------------------------


def _measure(options: argparse.Namespace) -> int:
    device = torch.device("cpu" if options.tiny else "cuda")
    resolutions = [64] if options.tiny else options.resolution
    print(f"{_name(device)}\n\n{'':36}{'µs':>10}{'spread':>9}{'GB/s':>9}{'of copy':>9}{'error':>10}")
    found: list[dict[str, Any]] = []
    for row in rows(resolutions, device, options.tiny, lambda name, _: options.only is None or options.only in name):
        found.append(row)
        print(_table(row, device), flush=True)
    if not found:
        raise ValueError(f"only={options.only} is in no operation's name")
    others = {name: metadata.version(name) for name in _OTHERS if kernel_cases.optional(name) is not None}
    result = {"device": _name(device), "tiny": options.tiny, "others": others}
    timed, broken = ([row for row in found if ("ways" in row) == whole] for whole in (True, False))
    _write(options, {**result, "operations": timed, "failed": broken})
    faulty = [row for row in found if row.get("faults")]
    for row in faulty:
        print(f"fails: {_title(row)}: {'; '.join(row['faults'])}")
    return 1 if faulty else 0


def rows(
    resolutions: Sequence[int], device: torch.device, tiny: bool, wanted: Callable[[str, int | None], bool]
) -> Iterator[dict[str, Any]]:
    """What is measured, a row an operation and resolution (None where it does not matter).

    Args:
        wanted: (operation and dtype, resolution) -> whether to measure it; asked just before.

    Yields:
        with "faults" where our way failed, and then without "ways" where nothing could be measured.
    """
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded
    # Donated buffers are gone after the backward, which is timed more than once.
    with functorch.patch(donated_buffer=False):
        for resolution, case in _cases(resolutions, device, tiny):
            if wanted(f"{case.name} {case.dtype}", resolution):
                yield {"operation": case.name, "resolution": resolution, **_attempted(case, device)}
                torch._dynamo.reset()


def _cases(resolutions: Sequence[int], device: torch.device, tiny: bool) -> Iterator[tuple[int | None, Case]]:
    """(resolution, or None where it does not matter, case)."""
    sizes = _TINY if tiny else {}
    for resolution in resolutions:
        yield from ((resolution, case) for case in kernel_cases.cases(Shapes(resolution, **sizes), device))
    yield from ((None, case) for case in optimizer_cases.cases(Shapes(resolutions[0], **sizes), device))


def _attempted(case: Case, device: torch.device) -> dict[str, Any]:
    """As `_measured`, whatever happens: others are to be measured, too."""
    try:
        return _measured(case, device)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"dtype": case.dtype, "moved_bytes": case.moved, "faults": [_told(error)]}


def _measured(case: Case, device: torch.device) -> dict[str, Any]:
    """Every way's time and error, and the copy's."""
    repeats = 3 if device.type == "cpu" else _REPEATS
    sets = sets_of_inputs(case.moved, device)
    copy = asdict(timed([_copy(case.moved, device) for _ in range(sets)], device, repeats))
    found: dict[str, Any] = {}
    faults: list[str] = []
    for way, prepare in case.ways.items():
        if isinstance(prepare, str):
            found[way] = {"absent": prepare}
            continue
        try:
            generator = torch.Generator(device).manual_seed(SEED)  # the same inputs for every way
            drawn = [case.inputs(generator) for _ in range(sets)]
            expected = case.exact(drawn[0])
            calls = [prepare(tensors) for tensors in drawn]
            error = _error(calls[0](), expected)
            del expected
            timing = timed(calls, device, repeats)
        except Exception as reason:  # someone else's code, or not enough memory for it
            found[way] = {"absent": _told(reason)}
            if way == "leapalign":
                traceback.print_exc(file=sys.stderr)
                faults.append(_told(reason))
        else:
            rate = case.moved / timing.seconds
            share = copy["seconds"] / timing.seconds
            found[way] = {**asdict(timing), "bytes_per_second": rate, "of_copy": share, "error": error}
        drawn, calls = [], []  # memory for the next
    copy["bytes_per_second"] = case.moved / copy["seconds"]
    row = {"dtype": case.dtype, "moved_bytes": case.moved, "sets_of_inputs": sets, "copy": copy, "ways": found}
    return {**row, "faults": faults} if faults else row


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}"


def _copy(moved: int, device: torch.device) -> Call:
    """A copy that reads and writes so many bytes together."""
    x, y = (torch.zeros(-(-moved // 2), dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: (y.copy_(x),)


def _error(results: Tensors, expected: Tensors) -> float:
    """Largest difference of an output, relative to its largest magnitude, of all outputs."""

    def of(result: Tensor, exact: Tensor) -> float:
        return float((result.double() - exact).abs().max() / exact.abs().max())

    pairs = zip(results, expected, strict=True)
    return max(of(result.detach(), exact.detach()) for result, exact in pairs)


def _table(row: dict[str, Any], device: torch.device) -> str:
    lines = [f"{_title(row)}, {row['moved_bytes'] / 1e6:.1f} MB"]
    if "ways" not in row:
        return "\n".join([*lines, *(f"  failed: {fault}" for fault in row["faults"])])
    for way, found in {"copy": row["copy"], **row["ways"]}.items():
        if "absent" in found:
            lines.append(f"  {way:34}{found['absent']}")
            continue
        line = f"  {way:34}{1e6 * found['seconds']:10.1f}{100 * found['spread']:8.1f}%"
        line += f"{found['bytes_per_second'] / 1e9:9.1f}"
        if "of_copy" in found:
            line += f"{100 * found['of_copy']:8.1f}%{found['error']:10.1e}"
        lines.append(line + ("" if found["recorded"] or device.type == "cpu" else "  one by one"))
    return "\n".join(lines)


def _title(row: dict[str, Any]) -> str:
    where = "" if row["resolution"] is None else f", {row['resolution']}²"
    return f"{row['operation']} {row['dtype']}{where}"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


# ---- both ----------------------------------------------------------------------------------------------------------


def _write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    if options.json is None:
        return
    command = ["kernels"]
    if options.compile_only:
        command += ["--compile-only"]
        if sorted(options.arch) != sorted(ARCHITECTURES):
            command += ["--arch", *map(str, options.arch)]
    else:
        command += ["--tiny"] if options.tiny else ["--resolution", *map(str, options.resolution)]
    command += ["--only", options.only] if options.only else []
    path = record.write(
        os.path.abspath(options.json.with_suffix("")), command, results, seeds=[] if options.compile_only else [SEED]
    )
    print(f"wrote {path.name}", file=sys.stderr)
