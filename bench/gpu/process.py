"""The process in which stages of `python -m bench gpu` run; bench/gpu/command.py starts it."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.gpu.stages import Context, EndError
from leapalign.kernels.host import native as host

_LINES = 6  # of a traceback that are kept


def main(text: str) -> int:
    """Run stages one after the other and write what they find to a file, a line of JSON each.

    Args:
        text: JSON of {"stages": [{"name", "function": "module:name", "least", "seconds", "fresh", "done"}], "tiny",
            "deadline", "lines": path}. A stage ends at its seconds or at the deadline; with fewer than `least` left
            none is begun. After one that failed nothing more is run here: it may have broken the device's context.
            Without stages it tells what the machine is.
    """
    given = json.loads(text)
    with Path(given["lines"]).open("a") as lines:
        unnamed = True

        def tell(event: str, **what: Any) -> None:
            nonlocal unnamed
            if unnamed and event in ("row", "end"):  # not before: asking for the GPU's name may make a context there
                unnamed = False
                with suppress(RuntimeError):  # a device that is broken tells nothing
                    tell("machine", **_machine(given["tiny"]))
            print(json.dumps({"event": event, **what}), file=lines, flush=True)

        if not given["tiny"] and not torch.cuda.is_available():
            tell("no gpu", torch=torch.__version__)
            return 2
        if not given["stages"]:
            tell("machine", **_machine(given["tiny"]))
        done = all(_run(stage, given, tell) for stage in given["stages"] if _begins(stage, given))
    return 0 if done else 1


def _begins(stage: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    return float(given["deadline"]) - time.monotonic() >= float(stage["least"])


def _run(stage: Mapping[str, Any], given: Mapping[str, Any], tell: Callable[..., None]) -> bool:
    name = stage["name"]
    tell("begin", stage=name)
    deadline = min(time.monotonic() + stage["seconds"], given["deadline"])
    context = Context(given["tiny"], deadline, stage["done"], lambda row: tell("row", stage=name, row=row))
    module, _, function = stage["function"].partition(":")
    try:
        getattr(import_module(module), function)(context)
        if not given["tiny"]:
            torch.cuda.synchronize()
    except EndError as error:
        tell("end", stage=name, status=error.status, error=str(error))
        return error.status != "failed"
    except BaseException:
        told = traceback.format_exc().strip().splitlines()[-_LINES:]
        tell("end", stage=name, status="failed", error="\n".join(told))
    else:
        tell("end", stage=name, status="passed")
        return True
    return False


def _machine(tiny: bool) -> dict[str, Any]:
    """What this is: bench/record.py, the GPU's size and software, and the instructions that host kernels use."""
    gpu = None
    if torch.cuda.is_available() and not tiny:
        properties = torch.cuda.get_device_properties(0)
        gpu = {"name": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda,
               "capability": f"{properties.major}.{properties.minor}"}  # fmt: skip
    kernels = host.instruction_sets()[-1:] or [f"none: {host.missing}"]
    return {"machine": {**record.machine(), "host_kernels": kernels[0]}, "versions": record.versions(), "gpu": gpu}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
