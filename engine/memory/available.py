"""How much of a machine this process can have: what memory is free or its own already, and its control groups' limits.

Arguments `proc` and `cgroup` say where these file systems are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

CONTEXT_BYTES = 256 * 2**20  # the least that a CUDA context takes when it is made
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # bytes: version 1 spells no limit as the largest multiple of a page


def host_available(*, proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Bytes of host memory that this process could have in all; None where the system does not tell.

    What the kernel calls available, but not more than the limits of the process's control groups leave (page cache that
    they could give back is not in the way), and what the process itself has: a plan counts all of it.
    """
    free = _kilobytes(proc / "meminfo", "MemAvailable")
    if free is None:
        return None
    for limit, used in _limits(proc, cgroup):
        free = min(free, max(limit - used, 0))
    return free + _own(proc)


def host_total(*, proc: Path = _PROC) -> int | None:
    """Bytes of the machine's host memory, free or not; None where the system does not tell."""
    return _kilobytes(proc / "meminfo", "MemTotal")


def host_limit(*, proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Bytes of host memory that the process's control groups let it and its neighbours in them have; None: no limit."""
    return min((limit for limit, _ in _limits(proc, cgroup)), default=None)


def cores_limit(*, proc: Path = _PROC, cgroup: Path = _CGROUP) -> float | None:
    """Cores' worth of time that the process's control groups let it and its neighbours in them have; None: no limit."""
    found = []
    for version, folder in _folders(proc, cgroup, "cpu"):
        if version == 2:
            words = "".join(_lines(folder / "cpu.max")).split()  # "200000 100000" or "max 100000"
            quota, period = (int(word) if word.isdecimal() else None for word in words or ["", ""])
        else:
            quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))  # quota -1: none
        if quota and period:
            found.append(quota / period)
    return min(found, default=None)


def device_available(device: torch.device) -> int | None:
    """Bytes of device memory that this process could have in all, its CUDA context included; None for the CPU.

    The context is there when free memory is asked for, and a plan counts it (Machine.device_base_bytes). So what it
    took at least is added; what kernels and workspaces take later is not: it has to come from what is free.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    own = int(torch.cuda.memory_reserved(device))
    return int(free) + own + min(CONTEXT_BYTES, int(total) - int(free) - own)


def _own(proc: Path) -> int:
    """Resident bytes of this process, without mapped files, which are available anyway."""
    parts = [_kilobytes(proc / "self" / "status", name) for name in ("RssAnon", "RssShmem")]
    found = [part for part in parts if part is not None]
    return sum(found) if found else _kilobytes(proc / "self" / "status", "VmRSS") or 0


def _limits(proc: Path, cgroup: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes used that cannot be given back) of each group with a limit that this process is in."""
    for version, folder in _folders(proc, cgroup, "memory"):
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = _number(folder / names[0]), _number(folder / names[1])
        if limit is not None and used is not None and limit < _UNLIMITED:
            yield limit, max(used - _entry(folder / "memory.stat", names[2]), 0)


def _folders(proc: Path, cgroup: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of each group for "memory" or "cpu" that this process is in."""
    for version, path in _groups(proc / "self" / "cgroup", controller):
        root = cgroup if version == 2 else cgroup / controller
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a limit holds for all groups below it
            yield version, folder
            if folder == root:
                break


def _groups(path: Path, controller: str) -> list[tuple[int, str]]:
    """(version, path) of the process's groups: lines such as "0::/user.slice" and "4:memory:/docker/1"."""
    lines = [line.split(":", 2) for line in _lines(path)]
    versions = [(2 if line[0] == "0" else 1, line) for line in lines if len(line) == 3]
    return [(version, line[2]) for version, line in versions if version == 2 or controller in line[1].split(",")]


def _kilobytes(path: Path, name: str) -> int | None:
    """Bytes of a line such as "VmRSS:   123 kB"."""
    value = next((line.split()[1] for line in _lines(path) if line.startswith(f"{name}:")), None)
    return None if value is None else int(value) * 1024


def _entry(path: Path, name: str) -> int:
    """Of a line such as "inactive_file 4096"; 0 without one."""
    return next((int(line.split()[1]) for line in _lines(path) if line.split()[0] == name), 0)


def _number(path: Path) -> int | None:
    """What a file with a single number says; None for "max", and without the file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="ascii").splitlines() if line.strip()]
    except OSError:
        return []
