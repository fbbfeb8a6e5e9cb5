"""What is available is what is free, within the limits of all groups, and what the process has already."""

from __future__ import annotations

import pytest
import torch

from leapalign.engine.memory import available
from leapalign.engine.memory.available import (
    CONTEXT_BYTES,
    cores_limit,
    device_available,
    host_available,
    host_limit,
    host_total,
)

GIB = 2**30
KIB_A_GIB = 2**20


@pytest.fixture
def system(tmp_path):
    """system(files) -> arguments of host_available; 10 GiB are available, 1 GiB is the process's own."""

    def make(files=(), *, meminfo=f"MemTotal: 99 kB\nMemAvailable: {10 * KIB_A_GIB} kB\n", status=None):
        found = {
            "proc/meminfo": meminfo,
            "proc/self/status": status or f"VmRSS: {9 * KIB_A_GIB} kB\nRssAnon: {KIB_A_GIB} kB\nRssFile: 7 kB\n",
            **dict(files),
        }
        for name, text in found.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return {"proc": tmp_path / "proc", "cgroup": tmp_path / "cgroup"}

    return make


def test_without_a_limit_what_is_free_and_what_the_process_has(system):
    assert host_available(**system()) == 11 * GIB


def test_an_older_kernel_tells_the_whole_process_only(system):
    assert host_available(**system(status=f"VmRSS: {2 * KIB_A_GIB} kB\n")) == 12 * GIB


def version2(folder, limit, current, inactive):
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{current}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 7\n",
    }


@pytest.mark.parametrize(
    ("limit", "current", "inactive", "left"),
    [
        (4 * GIB, 3 * GIB, 2 * GIB, 3 * GIB),  # the cache can be given back
        (4 * GIB, 3 * GIB, 0, GIB),
        (4 * GIB, 5 * GIB, 0, 0),
        (64 * GIB, GIB, 0, 10 * GIB),  # more than is free
        ("max", GIB, 0, 10 * GIB),
    ],
)
def test_a_group_limits(system, limit, current, inactive, left):
    files = {"proc/self/cgroup": "0::/user/job\n", **version2("cgroup/user/job", limit, current, inactive)}
    assert host_available(**system(files)) == left + GIB


def test_a_group_above_limits_too(system):
    files = {"proc/self/cgroup": "0::/user/job\n", **version2("cgroup/user/job", "max", 1, 0)}
    files |= version2("cgroup/user", 8 * GIB, 6 * GIB, GIB)
    assert host_available(**system(files)) == 3 * GIB + GIB


def test_inside_a_container_the_groups_own_folder_is_the_root(system):
    files = {"proc/self/cgroup": "0::/docker/1\n", **version2("cgroup", 2 * GIB, GIB, 0)}
    assert host_available(**system(files)) == GIB + GIB


@pytest.mark.parametrize(("limit", "left"), [(4 * GIB, 3 * GIB), (2**63 - 4096, 10 * GIB)])
def test_groups_of_version_1(system, limit, left):
    folder = "cgroup/memory/docker/1"
    files = {
        "proc/self/cgroup": "5:cpuset:/other\n4:cpu,memory:/docker/1\n",
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{2 * GIB}\n",
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
    }
    assert host_available(**system(files)) == left + GIB


def test_a_system_that_does_not_tell(tmp_path):
    assert host_available(proc=tmp_path, cgroup=tmp_path) is None


def test_the_context_counts_as_the_processes_own(monkeypatch):
    """At least what a context takes is added, but never more than the card has."""
    cuda = torch.device("cuda", 1)
    for free, total, reserved, expected in (
        (10 * GIB, 24 * GIB, 2 * GIB, 12 * GIB + CONTEXT_BYTES),
        (20 * GIB, 24 * GIB, 4 * GIB - 5, 24 * GIB),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, found=(free, total): found)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, found=reserved: found)
        assert device_available(cuda) == expected
    assert available.device_available(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/user/job\n", "cgroup/user/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/job\n", "cgroup/job/cpu.max": "400000 100000\n", "cgroup/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/job\n", "cgroup/job/cpu.max": "max 100000\n"}, None),
        ({}, None),
    ],
)
def test_cores_that_groups_let_it_have(system, files, expected):
    assert cores_limit(**system(files)) == expected


@pytest.mark.parametrize(("quota", "expected"), [(50000, 0.5), (-1, None)])
def test_cores_in_groups_of_version_1(system, quota, expected):
    folder = "cgroup/cpu/docker/1"
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/docker/1\n3:memory:/other\n",
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": "100000\n",
    }
    assert cores_limit(**system(files)) == expected


def test_the_machines_memory_and_the_groups_limit(system):
    files = {"proc/self/cgroup": "0::/user/job\n", **version2("cgroup/user/job", 4 * GIB, 5 * GIB, 0)}
    assert host_limit(**system(files)) == 4 * GIB
    assert host_limit(**system({"proc/self/cgroup": "0::/other\n"})) is None
    assert host_total(proc=system()["proc"]) == 99 * 1024
