"""The ledger's numbers are the process's own, and stand beside the plan's."""

from __future__ import annotations

import torch

from leapalign.engine import ledger as module
from leapalign.engine.ledger import Ledger, resident_bytes
from leapalign.engine.plan import MemoryPlan, PhaseCost

MIB = 2**20
PLAN = MemoryPlan(phases=(PhaseCost("rollout", 100, 2**50, 0, 0, 0, 1.0, {"device: base": 10}),))


def test_host_memory_of_a_phase():
    before = resident_bytes()
    assert before is not None and before > MIB
    ledger = Ledger("cpu")
    with ledger.phase("rollout"):
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        del held
    found = ledger.phases["rollout"]
    assert found.device_bytes is None
    assert found.host_bytes is not None and found.host_bytes >= before + 60 * MIB
    with ledger.phase("reward"):  # the peak before it is not its own
        pass
    later = ledger.phases["reward"].host_bytes
    assert later is not None and later <= found.host_bytes - 60 * MIB


def test_a_row_has_the_plans_numbers_and_starts_anew():
    ledger = Ledger("cpu", PLAN)
    for name in ("rollout", "rollout", "validation"):
        with ledger.phase(name):
            pass
    row = ledger.row(3)
    assert row["step"] == 3 and list(row["memory"]) == ["rollout", "validation"]
    assert row["memory"]["rollout"]["planned_device_bytes"] == 90, "no allocator shows the base"
    assert row["memory"]["rollout"]["planned_host_bytes"] == 2**50
    assert row["memory"]["validation"].keys() == {"device_bytes", "host_bytes"}
    assert ledger.row(4) == {"step": 4, "memory": {}}


def test_the_most_of_several_phases_of_a_name_on_a_gpu(monkeypatch):
    peaks = iter([70, 120, 90])
    resets: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    ledger = Ledger("cuda", PLAN)
    for _ in range(3):
        with ledger.phase("rollout"):
            pass
    assert len(resets) == 3
    told = "rollout took 120B of device memory, 90B were planned: plan for less vram if it runs short"
    assert ledger.exceeded() == [told]
    assert ledger.row(0)["memory"]["rollout"]["device_bytes"] == 120


def test_a_phase_that_fails_is_measured_too():
    ledger = Ledger("cpu")
    try:
        with ledger.phase("reward"):
            raise MemoryError
    except MemoryError:
        pass
    assert "reward" in ledger.phases


def test_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_STATUS", tmp_path / "none")
    assert resident_bytes() is None
