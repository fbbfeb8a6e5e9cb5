"""Result files: what a benchmark measured, with the machine, versions and command that it takes to measure it again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import sources

RESULTS = Path(__file__).parent / "results"
_BEGAN = time.monotonic()  # of the command: its module imports this one
_PACKAGES = ("leapalign", "torch", "triton", "diffusers", "transformers", "safetensors", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory in bytes and, where there is one, the GPU."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory": memory, "gpu": gpu}


def versions() -> dict[str, str]:
    """Python and the installed packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(name: str, command: list[str], results: dict[str, Any], *, seeds: Sequence[int]) -> Path:
    """Write bench/results/<name>.json: what it takes to measure it again, the seconds that it took, and `results`.

    Args:
        command: what follows `bench`.
        seeds: of everything that is drawn; empty where no number depends on it.
    """
    RESULTS.mkdir(exist_ok=True)
    head = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "bench", *command]),
        "command_seconds": round(time.monotonic() - _BEGAN, 1),
        "seed": list(seeds),
        "machine": machine(),
        "versions": versions(),
        "sources": sources.digests(command[0]),
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**head, **results}, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any]:
    """The result file bench/results/<name>.json."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found
