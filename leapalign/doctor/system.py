"""What a machine is: its GPU, its host, the disk below a folder, and the software; found out in a second or two."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import resource
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from leapalign.engine.memory.arena import HostArena
from leapalign.engine.memory.available import cores_limit, device_available, host_available, host_limit, host_total
from leapalign.kernels.host import native as host

PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "bitsandbytes", "xformers", "flash-attn")
WRITTEN = 64 * 2**20  # bytes of the file that is written and removed
HASHED = bytes(4 * 2**20)  # long enough for threads to be without Python's lock nearly all the time


@dataclass(frozen=True)
class Gpu:
    """The GPU that a run with device "auto" computes on.

    Attributes:
        capability: "8.9".
        total_bytes, free_bytes: of device memory; free is what this process could have in all.
        link: such as "16.0 GT/s PCIe x16", at this moment: an idle card slows its link down. None: not told.
    """

    name: str
    capability: str
    total_bytes: int
    free_bytes: int
    link: str | None


@dataclass(frozen=True)
class Host:
    """Processor and memory. Bytes and limits are None where the system does not tell them, or has none.

    Attributes:
        cores: of the machine, hardware threads counted each.
        usable_cores: that this process may run on.
        cores_limit: cores' worth of time that its control groups let it have.
        cores_obtained: that many threads at once, one for each usable core, really got.
        threads: of torch, and of the host kernels where nothing else is configured.
        total_bytes, limit_bytes, available_bytes: of the machine, of its control groups, and what the process could
            have in all.
        memlock_bytes: RLIMIT_MEMLOCK, which CUDA's locking is usually exempt from.
        instruction_set: of the host kernels; None without the native module.
        missing: why there is no native module; empty where there is.
    """

    cpu: str
    cores: int | None
    usable_cores: int
    cores_limit: float | None
    cores_obtained: float
    threads: int
    total_bytes: int | None
    limit_bytes: int | None
    available_bytes: int | None
    memlock_bytes: int | None
    instruction_set: str | None
    missing: str


@dataclass(frozen=True)
class Disk:
    """The disk below a folder; the rate in bytes a second is None where nothing could be written, for that reason."""

    free_bytes: int
    write_bytes_per_s: float | None
    reason: str = ""


def gpu(device: torch.device) -> Gpu:
    """What `torch.cuda` tells of the device."""
    properties = torch.cuda.get_device_properties(device)
    free = device_available(device)
    assert free is not None, "a CPU was asked for its GPU's memory"
    capability = f"{properties.major}.{properties.minor}"
    return Gpu(properties.name, capability, int(properties.total_memory), free, _link(properties))


def no_gpu() -> str:
    """Why torch has no GPU here, and what to do about it."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with it where there is a GPU"
    if not Path("/proc/driver/nvidia/version").exists() and platform.system() == "Linux":
        return "no NVIDIA driver is loaded; where there is a GPU, install its driver or give the container access to it"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES = '{visible}' leaves torch no GPU; unset it"
    return f"the driver gives torch {torch.__version__}, built for CUDA {torch.version.cuda}, no GPU; see nvidia-smi"


def host_of(seconds: float) -> Host:
    """Processor, memory and limits; the cores are measured for so many seconds."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Host(
        cpu=_cpu(),
        cores=os.cpu_count(),
        usable_cores=usable,
        cores_limit=cores_limit(),
        cores_obtained=cores_obtained(usable, seconds),
        threads=host.number_of_threads(None),
        total_bytes=host_total(),
        limit_bytes=host_limit(),
        available_bytes=host_available(),
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        instruction_set=None if host.native is None else host.native.isa(),
        missing=host.missing,
    )


def cores_obtained(threads: int, seconds: float) -> float:
    """Processor time a second of so many busy threads of this process: at most `threads`."""
    end = time.perf_counter() + seconds

    def work() -> None:
        while time.perf_counter() < end:
            hashlib.sha256(HASHED)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    begin, used = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return min((time.process_time() - used) / (time.perf_counter() - begin), float(threads))


def lockable(most: int, seconds: float, *, least: int = 2**28) -> tuple[int, str]:
    """(bytes of host memory that CUDA locked at once, why not twice as many: empty where it was not tried).

    Sizes double from `least` up to `most` while there is time. One at a time, and given back.
    """
    locked, size, end = 0, least, time.perf_counter() + seconds
    while size <= most:
        begin = time.perf_counter()
        try:
            HostArena({"": size}, pin=True).close()
        except (MemoryError, RuntimeError) as error:
            with suppress(RuntimeError):  # CUDA tells its last error once more, to whoever asks next
                torch.ones(1, device="cuda").add_(1)
                torch.cuda.synchronize()
            return locked, str(error)
        locked, now = size, time.perf_counter()
        if now + 2 * (now - begin) > end:
            break
        size *= 2
    return locked, ""


def disk_of(folder: Path) -> Disk:
    """Room below the folder, and the rate at which a file there reaches the disk. The file is removed."""
    free = shutil.disk_usage(folder).free
    if free < 2 * WRITTEN:
        return Disk(free, None, "it is full")
    piece = os.urandom(2**20)  # some file systems compress
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            begin = time.perf_counter()
            for _ in range(WRITTEN // len(piece)):
                file.write(piece)
            os.fsync(file.fileno())
            return Disk(free, WRITTEN / (time.perf_counter() - begin))
    except OSError as error:
        return Disk(free, None, error.strerror or str(error))


def software() -> dict[str, str | None]:
    """{name: version} of Python, the packages that matter, CUDA and the driver; None: not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {"cuda": torch.version.cuda, "driver": _driver()}


def _driver() -> str | None:
    with suppress(OSError):
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
        if match := re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", first):
            return match[0]
    return None


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _link(properties: object) -> str | None:
    """Speed and lanes, as Linux lists them for the card's address."""
    numbers: list[Any] = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in numbers:
        return None
    folder = Path("/sys/bus/pci/devices") / "{:04x}:{:02x}:{:02x}.0".format(*numbers)
    with suppress(OSError):
        speed, lanes = ((folder / f"current_link_{what}").read_text().strip() for what in ("speed", "width"))
        return f"{speed} x{lanes}"
    return None
