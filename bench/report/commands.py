"""Every command that measures, what it takes and what it writes: the first table of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.report.markdown import NOTHING, table

GPU = " on a GPU"


@dataclass(frozen=True)
class Command:
    """What is typed.

    Attributes:
        what: it measures.
        result: name of its file in bench/results/; empty: it writes none there.
        writes: what else it writes.
        needs: what it takes besides.
    """

    text: str
    what: str
    result: str
    writes: str = ""
    needs: str = ""


def _large(model: str) -> Command:
    name = f"trajectory-{model}"
    text = f"python -m bench memory --trajectory 1,2,3,5,10,25 --model {model} --blocks"
    text += " 19,38 9,19" if model == "flux1_dev" else " 24 12"
    return Command(
        f"{text} --batch 1,4 --resolution 512,1024 --output {name}",
        f"the same of {model}, counted; with `--gpu` measured on a GPU",
        name,
    )


def _counted(side: str, resident: str, what: str, suffix: str = "", more: str = "") -> Command:
    name = "-".join(filter(None, ["memory-flux1-dev", side, resident, suffix]))
    text = f"python -m bench memory --simulate flux1_dev --resolution {side} --resident {resident}{more}"
    return Command(f"{text} --output {name}", what, name)


QUALITY = Command("python -m bench quality", "pictures before and after alignment, three seeds", "quality-shapes")
CURVES = Command("python -m bench curves", "training with the 8-bit optimizer beside float32", "curves-shapes")
OPTIMIZERS = Command("python -m bench optimizers", "rounding, on one fixed batch", "optimizers-shapes")
TRACKING = Command(
    "python -m bench tracking --seeds 1 --output tracking-shapes",
    "1,000 steps of flow matching under 8-bit optimizers",
    "tracking-shapes",
)
BITS = Command("python -m bench bits", "whether weights depend on where things were", "bits-shapes")
STATES = Command(
    "python -m bench optimizer-states --output optimizer-states",
    "bytes a parameter that optimizers keep",
    "optimizer-states",
)
COUNTED = (
    _counted("512", "all", "device memory of a step of FLUX.1-dev, counted on fake tensors"),
    _counted("512", "none", "the same with two blocks on the device"),
    _counted("512", "none", "the same in mode held", "held", " --mode held"),
    _counted("512", "none", "the same, block inputs recomputed", "recompute", " --recompute"),
    _counted("1024", "all", "the first of these at 1024 pixels"),
    _counted("1024", "none", "the same with two blocks on the device"),
)
TRAJECTORY = Command(
    "python -m bench memory --trajectory 1,2,3,5,10,25 --model shapes --blocks 2,4 4,8 --batch 1,4 "
    "--resolution 128,256 --output trajectory-shapes",
    "memory against differentiated steps of the packaged model, measured",
    "trajectory-shapes",
)
THROUGHPUT = Command(
    "python -m bench throughput --model flux1_dev --output throughput-flux1-dev",
    "seconds of a step by phase: streamed, resident and a plain trainer",
    "throughput-flux1-dev",
    needs=GPU,
)
THROUGHPUT_SMALL = Command(
    "python -m bench throughput --model shapes --output throughput-shapes",
    "the same of the packaged model, on a CPU as well",
    "throughput-shapes",
)
HOST_OPTIMIZER = Command(
    "python -m bench host-optimizer --output host-optimizer",
    "parameters a second of AdamW on the host",
    "host-optimizer",
)
KERNELS = Command(
    "python -m bench kernels --compile-only --json bench/results/kernels-compiled.json",
    "registers, spills and width of access of every kernel on six architectures",
    "kernels-compiled",
)
KERNELS_TIMED = Command(
    "python -m bench kernels --json bench/results/kernels-timed.json",
    "bytes a second of every kernel beside other ways",
    "kernels-timed",
    needs=GPU,
)
RUN = Command(
    "python -m bench gpu --minutes 9",
    "what needs a GPU, in stages, the most valuable first, as much as fits into these minutes",
    "",
    "`bench/results/<gpu>-<date>.json`",
    GPU,
)
DOCTOR = Command("leapalign doctor --output bench/results/doctor.json", "this machine, and which presets fit", "doctor")
MICRO = Command(
    "pytest bench --benchmark-only", "single functions", "", "nothing; with `--benchmark-save NAME`, `.benchmarks/`"
)
REPORT = Command(
    "python -m bench report", "nothing: it writes what the results say", "", "`docs/benchmarks.md`, its figures, README"
)

ALL = (
    QUALITY, CURVES, OPTIMIZERS, TRACKING, BITS, STATES, *COUNTED, TRAJECTORY, _large("sd35_medium"),
    _large("flux1_dev"), THROUGHPUT, THROUGHPUT_SMALL, HOST_OPTIMIZER, KERNELS, KERNELS_TIMED, RUN, DOCTOR, MICRO,
    REPORT,
)  # fmt: skip


def overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a command.

    Args:
        results: {name of the file: result} of those that hold today.
    """
    rows = []
    for command in ALL:
        what = f"{command.what}; needs a GPU" if command.needs else command.what
        writes = command.writes or f"`bench/results/{command.result}.json`"
        rows.append([f"`{command.text}`", what, writes, _minutes(command, results)])
    text = (
        "Minutes are those that the files there took, on the machine and by the command that stand with their tables. "
        "`--help` after a command's name lists its options, `--tiny` tries out what needs a GPU without one."
    )
    return f"{table(['command', 'measures', 'writes', 'minutes'], rows, left=3)}\n{text}\n"


def held(results: Mapping[str, Mapping[str, Any]], *, measured: bool) -> str:
    """What has a result that holds, with its day and machine; or what has none, with the command that makes one.

    Args:
        results: {name of the file: result} of those that hold today and that no change has made old.
    """
    rows = []
    for command in ALL:
        if not command.result and command is not RUN:
            continue
        found = [result for name, result in results.items() if _is_of(command, name, result)]
        if measured and found:
            machine = found[-1].get("machine", {})
            rows.append([command.what, found[-1]["date"], machine.get("gpu") or machine.get("cpu") or "see the file"])
        elif not measured and not found:
            rows.append([f"{command.what}{command.needs and '; needs a GPU'}", f"`{command.text}`"])
    if not rows:
        return "Nothing.\n"
    return (
        table(
            ["measured", "day", "machine"] if measured else ["not measured", "command"], rows, left=3 if measured else 2
        )
        + "\n"
    )


def _minutes(command: Command, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Of its file; of the quickest and the slowest run on a GPU."""
    seconds = [
        result["command_seconds"]
        for name, result in results.items()
        if "command_seconds" in result and _is_of(command, name, result)
    ]
    if not seconds:
        return NOTHING
    low, high = (f"{each / 60:.1f}" for each in (min(seconds), max(seconds)))
    return low if low == high else f"{low} to {high}"


def _is_of(command: Command, name: str, result: Mapping[str, Any]) -> bool:
    return "stages" in result if command is RUN else name == command.result
