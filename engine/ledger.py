"""What a step really takes: the measured peak of each phase, beside the planned one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leapalign.engine.memory.sizes import spell_bytes
from leapalign.engine.plan import MemoryPlan

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")  # "5" written here forgets the process's peak


@dataclass
class Measured:
    """Peaks of a phase; None where this machine cannot tell.

    Attributes:
        device_bytes: the most that torch's allocator had handed out. A plan's include what no allocator shows as well,
            "device: base" in their breakdown, which is left out where the two stand side by side.
        host_bytes: the most resident memory that the process had, mapped files such as libraries apart; where the
            system cannot forget an earlier peak, what it had at the phase's end.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None


class Ledger:
    """Measures the phases of a step. Reading costs microseconds and never waits for the device.

        with ledger.phase("rollout"):
            ...
        metrics.append(ledger.row(step))

    Attributes:
        phases: {name: Measured}, the most since the last `row`.
    """

    def __init__(self, device: torch.device | str, plan: MemoryPlan | None = None) -> None:
        """
        Args:
            device: where the model computes; its memory is measured where it is a GPU.
            plan: whose predictions are put beside what is measured.
        """
        self.device, self.plan = torch.device(device), plan
        self.phases: dict[str, Measured] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is this phase; a name may come several times a step. Phases are not nested."""
        measures = self.device.type == "cuda"
        forgot = _forget_peak()
        if measures:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            found = self.phases.setdefault(name, Measured())
            if measures:
                found.device_bytes = _most(found.device_bytes, torch.cuda.max_memory_allocated(self.device))
            found.host_bytes = _most(found.host_bytes, resident_bytes(peak=forgot))

    def clear(self) -> None:
        """Forget what was measured since the last row, such as a validation."""
        self.phases = {}

    def row(self, step: int) -> dict[str, Any]:
        """{"step", "memory": {phase: {device_bytes, host_bytes, planned_...}}} since the last row, for metrics.jsonl.

        A planned phase's name is that of engine/planning/costs.py; a phase of another name has no planned numbers.
        """
        planned = self._planned()
        memory: dict[str, dict[str, int | None]] = {}
        for name, found in self.phases.items():
            memory[name] = {"device_bytes": found.device_bytes, "host_bytes": found.host_bytes}
            if name in planned:
                memory[name]["planned_device_bytes"], memory[name]["planned_host_bytes"] = planned[name]
        self.phases = {}
        return {"step": step, "memory": memory}

    def exceeded(self) -> list[str]:
        """One line for each phase on a GPU whose measured device or host bytes are above the plan's."""
        lines, planned = [], self._planned()
        for name, found in self.phases.items():
            if found.device_bytes is None or name not in planned:  # without a GPU both are one
                continue
            for what, took, limit in zip(
                ("device", "host"), (found.device_bytes, found.host_bytes), planned[name], strict=True
            ):
                if took is not None and took > limit:
                    key = "vram" if what == "device" else "ram"
                    lines.append(
                        f"{name} took {spell_bytes(took)} of {what} memory, {spell_bytes(limit)} were planned: "
                        f"plan for less {key} if it runs short"
                    )
        return lines

    def _planned(self) -> dict[str, tuple[int, int]]:
        """{phase: (device bytes that an allocator shows, host bytes)}."""
        phases = self.plan.phases if self.plan else ()
        return {p.name: (p.device_bytes - p.breakdown.get("device: base", 0), p.host_bytes) for p in phases}


def resident_bytes(*, peak: bool = False) -> int | None:
    """Resident memory of this process, mapped files apart, now or at most; None where the system does not tell."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Vm", "Rss"))}
    most = found.get("VmHWM" if peak else "VmRSS")
    return None if most is None else most - found.get("RssFile", 0)


def _forget_peak() -> bool:
    """Start the process's peak anew; False where the system does not let us."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _most(before: int | None, now: int | None) -> int | None:
    return now if before is None or now is None else max(before, now)
