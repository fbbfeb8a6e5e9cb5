"""What a step really takes: the measured peak of each phase, beside the planned one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leapalign.engine.plan import MemoryPlan

_STATUS = Path("/proc/self/status")


@dataclass
class Measured:
    """Peaks of a phase; None where this machine cannot tell.

    Attributes:
        device_bytes: the most that torch's allocator had handed out.
        host_bytes: resident memory of the process at the phase's end.
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
        if measures:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            found = self.phases.setdefault(name, Measured())
            if measures:
                found.device_bytes = _most(found.device_bytes, torch.cuda.max_memory_allocated(self.device))
            found.host_bytes = _most(found.host_bytes, resident_bytes())

    def row(self, step: int) -> dict[str, Any]:
        """{"step", "memory": {phase: {device_bytes, host_bytes, planned_...}}} since the last row, for metrics.jsonl.

        A planned phase's name is that of engine/cost.py; a phase of another name has no planned numbers.
        """
        planned = {phase.name: phase for phase in self.plan.phases} if self.plan else {}
        memory: dict[str, dict[str, int | None]] = {}
        for name, found in self.phases.items():
            memory[name] = {"device_bytes": found.device_bytes, "host_bytes": found.host_bytes}
            if name in planned:
                memory[name]["planned_device_bytes"] = planned[name].device_bytes
                memory[name]["planned_host_bytes"] = planned[name].host_bytes
        self.phases = {}
        return {"step": step, "memory": memory}

    def exceeded(self) -> list[str]:
        """One line for each phase whose measured device bytes are above the plan's."""
        planned = {phase.name: phase.device_bytes for phase in self.plan.phases} if self.plan else {}
        return [
            f"{name} took {found.device_bytes} bytes of device memory, {planned[name]} were planned"
            for name, found in self.phases.items()
            if found.device_bytes is not None and found.device_bytes > planned.get(name, found.device_bytes)
        ]


def resident_bytes() -> int | None:
    """Memory of this process that is resident now; None where the system does not tell."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    value = next((line.split()[1] for line in lines if line.startswith("VmRSS:")), None)
    return None if value is None else int(value) * 1024


def _most(before: int | None, now: int | None) -> int | None:
    return now if before is None or now is None else max(before, now)
