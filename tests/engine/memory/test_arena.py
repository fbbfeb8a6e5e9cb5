"""Host memory: exact, zero, lazy, locked once and unlocked once."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapalign.engine.memory import arena as module
from leapalign.engine.memory.arena import PAGE, HostArena


class Cudart:
    """Stands for the CUDA runtime: keeps the locked ranges, and refuses what CUDA refuses."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.calls = status, 0
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 1 and address % mmap.PAGESIZE == 0
        self.calls += 1
        if self.status == 0:
            assert address not in self.locked
            self.locked[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.locked.pop(address, None) else 1


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    fake = Cudart()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


@given(st.lists(st.integers(0, 3 * PAGE), max_size=8))
def test_regions_have_the_exact_size_on_pages_of_their_own(sizes: list[int]) -> None:
    arena = HostArena({str(i): size for i, size in enumerate(sizes)}, pin=False)
    assert list(arena) == [str(i) for i in range(len(sizes))] and len(arena) == len(sizes)
    assert arena.nbytes == sum(-(-size // PAGE) * PAGE for size in sizes)
    full = [arena[str(i)] for i, size in enumerate(sizes) if size]
    first = full[0].data_ptr() if full else 0
    for region, size in zip(full, filter(None, sizes), strict=True):
        assert region.dtype == torch.uint8 and region.shape == (size,)
        assert region.data_ptr() % PAGE == 0 and first <= region.data_ptr() <= first + arena.nbytes - size
        assert not region.any()
    for i, region in enumerate(full):
        region.fill_(i + 1)
    for i, region in enumerate(full):
        assert (region == i + 1).all()


def test_regions_have_storages_and_version_counters_of_their_own() -> None:
    arena = HostArena({"a": 10, "b": 10}, pin=False)
    before = arena["b"]._version
    arena["a"].zero_()
    assert arena["b"]._version == before
    assert arena["a"].untyped_storage().nbytes() == 10


def test_a_view_outlives_the_arena() -> None:
    arena = HostArena({"a": 100}, pin=False)
    view = arena["a"][50:].view(torch.int16)
    view.fill_(7)
    arena.close()
    assert len(arena) == 0
    del arena
    gc.collect()
    assert (view == 7).all()


def test_memory_is_taken_when_touched_and_returned_when_closed() -> None:
    """In a process of its own; 64 MiB of slack for whatever else the interpreter does meanwhile."""
    script = """
from pathlib import Path
import torch
from leapalign.engine.memory.arena import HostArena

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if "VmRSS" in line)

MiB = 2**20
torch.ones(10).sum()
start = resident()
arena = HostArena({"a": 256 * MiB, "b": 256 * MiB}, pin=False)
assert resident() - start < 64 * MiB
arena["a"].fill_(1)
assert 192 * MiB < resident() - start < 320 * MiB
arena.close()
assert resident() - start < 64 * MiB
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])


def test_no_room_is_said_in_one_line() -> None:
    with pytest.raises(MemoryError, match=r"no room for 4294967296\.0 GiB") as error:
        HostArena({"a": 2**62}, pin=False)
    assert "\n" not in str(error.value)


def test_the_whole_mapping_is_locked_once_and_unlocked_once(cudart: Cudart) -> None:
    arena = HostArena({"a": 1, "b": PAGE + 1, "empty": 0})
    assert cudart.locked == {arena["a"].data_ptr(): 3 * PAGE}
    states = [arena.pinned]
    for _ in range(2):
        arena.close()
        states.append(arena.pinned)
    assert cudart.locked == {} and cudart.calls == 1 and states == [True, False, False]


def test_garbage_collection_unlocks(cudart: Cudart) -> None:
    arena = HostArena({"a": 1})
    view = arena["a"]
    del arena
    gc.collect()
    assert cudart.locked == {}
    assert view.item() == 0  # still mapped


def test_the_mapping_is_unlocked_before_it_is_unmapped(cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[Any] = []

    class Mapping(mmap.mmap):
        def __del__(self) -> None:
            assert cudart.locked == {}
            mapped.append(self)

    monkeypatch.setattr(module.mmap, "mmap", Mapping)
    arena = HostArena({"a": 1})
    assert cudart.locked
    del arena
    gc.collect()
    assert len(mapped) == 1


def test_nothing_is_locked_without_memory_or_wish(cudart: Cudart) -> None:
    assert not HostArena({"a": 0}).pinned
    assert not HostArena({"a": 1}, pin=False).pinned
    assert cudart.calls == 0


def test_a_refused_lock_names_the_bytes_and_the_limit(cudart: Cudart) -> None:
    cudart.status = 2
    with pytest.raises(RuntimeError, match=r"cannot lock 8192 bytes .*error 2.*ulimit -l is") as error:
        HostArena({"a": PAGE + 1})
    assert "\n" not in str(error.value)
    gc.collect()  # what was not locked is not unlocked


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without a GPU")
def test_pinning_needs_a_gpu() -> None:
    assert not HostArena({"a": 1}).pinned
    with pytest.raises(ValueError, match="no GPU to lock pages for; leave pin out"):
        HostArena({"a": 1}, pin=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_the_regions_as_pinned() -> None:
    arena = HostArena({"a": 1000, "b": 5000})
    assert arena["a"].is_pinned() and arena["b"][100:].is_pinned()
    arena["b"].fill_(3)
    copy = arena["b"].to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert (copy == 3).all()
    view = arena["b"]
    arena.close()
    assert not view.is_pinned() and (view == 3).all()
