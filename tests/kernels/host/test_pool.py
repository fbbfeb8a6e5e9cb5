"""Work that is handed over: its order, its handles and their tensors, errors, threads, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit import host as host_adamw8bit
from leapalign.kernels.host import native as host
from leapalign.kernels.host import pool as host_pool
from tests.kernels.host.host_runs import (
    GRADIENTS,
    HYPER,
    busy,
    copied,
    differing,
    every_isa,
    needs_native,
    randn,
    run_of,
)

ROOT = Path(__file__).resolve().parents[3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and pins threads: needs Linux")


@pytest.fixture
def configured() -> Iterator[None]:
    """Leaves the threads as they were."""
    yield
    host.configure()


# ---- order and handles ---------------------------------------------------------------------------------------------


@needs_native
@settings(max_examples=20)
@given(
    work=st.lists(st.sampled_from(["copy", "accumulate", "ema", "update"]), min_size=1, max_size=8),
    threads=st.lists(st.integers(1, 7), min_size=8, max_size=8),
)
def test_work_is_done_in_the_order_in_which_it_is_handed_over(work: list[str], threads: list[int]) -> None:
    """None of these may change places. Large enough for three threads each; only the last one is waited for."""
    count = 2 * 2**16 + 5
    x, y = randn(count, seed=1), randn(count, seed=2)
    ours, theirs = run_of("float32", None, count, 3), run_of("float32", None, count, 3)
    w, expected = ours["weights"], theirs["weights"]
    options: dict[str, Any] = {"hp": HYPER, "seed": 1, "parameter": 2}
    for name, number in zip(work, threads, strict=False):
        if name == "copy":
            last = host.copy(w, x, threads=number)
            expected.copy_(x)
        elif name == "accumulate":
            last = host.accumulate(w, y, threads=number)
            expected += y
        elif name == "ema":
            last = host.ema(w, y, 0.5, threads=number)
            expected += (y - expected) * 0.5
        else:
            last = host_adamw8bit.update(gradient=y, **ours, **options, threads=number)
            adamw8bit.update(gradient=y, **theirs, **options)
    last.wait()
    assert last.done()
    assert not differing(ours, theirs)


@needs_native
def test_a_handle_says_when_its_work_is_done() -> None:
    total = torch.zeros(5)
    before = busy()
    handle = host.accumulate(total, torch.ones(5))
    first, second = handle.done(), before.done()
    assert second or not first  # not before what was handed over before
    handle.wait()
    assert handle.done() and before.done()
    assert total.tolist() == [1.0] * 5
    handle.wait()  # again
    assert handle.result() == 0.0 and total.tolist() == [1.0] * 5


@needs_native
def test_tensors_are_kept_until_the_work_is_done_and_no_longer() -> None:
    """The array that a tensor is a view of dies with the last tensor."""
    last = busy()
    array = torch.zeros(1 << 20).numpy()
    alive = weakref.ref(array)
    host.accumulate(torch.from_numpy(array), torch.ones(1 << 20))  # neither handle nor tensors have a name
    del array
    kept = alive() is not None
    assert not last.done(), "the machine was held up: the work before took no time"
    assert kept
    host.accumulate(torch.zeros(1), torch.zeros(1)).wait()
    assert alive() is None


@needs_native
def test_an_interrupt_while_work_is_handed_over_frees_nothing_that_it_reads() -> None:
    assert host.native is not None
    accumulate = host.native.accumulate

    def interrupted() -> weakref.ref[Any]:
        array = torch.zeros(1 << 20).numpy()
        tensor = torch.from_numpy(array)

        def start() -> host_pool.Job:
            accumulate(tensor, torch.ones(1 << 20), 1)
            raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            host_pool.Handle(start, (tensor,))
        return weakref.ref(array)

    last = busy()
    alive = interrupted()
    kept = alive() is not None
    assert not last.done(), "the machine was held up: the work before took no time"
    assert kept
    host.accumulate(torch.zeros(1), torch.zeros(1)).wait()
    assert alive() is None and not host_pool._unfinished


@needs_native
def test_what_runs_while_work_is_handed_over_may_wait_for_other_work() -> None:
    """A collection may run a finalizer there, and a signal its handler."""
    before, total = busy(), torch.zeros(3)

    def start() -> host_pool.Job:
        before.wait()
        return host.accumulate(total, torch.ones(3))._started

    thread = threading.Thread(target=lambda: host_pool.Handle(start, (total,)).wait(), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and total.tolist() == [1.0] * 3


@needs_native
def test_many_python_threads_may_hand_work_over() -> None:
    """Whole numbers, so that only the number of additions counts: each is done once, and none at the same time."""
    shared, own, rounds = torch.zeros(2**17 + 1), [torch.zeros(100) for _ in range(4)], 50
    ones = torch.ones(2**17 + 1)

    def work(index: int) -> None:
        for turn in range(rounds):
            host.accumulate(shared, ones, threads=1 + turn % 3)
            host.accumulate(own[index], ones[:100]).wait()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    host.accumulate(torch.zeros(1), torch.zeros(1)).wait()
    assert torch.equal(shared, 4 * rounds * ones)
    assert all(torch.equal(total, rounds * ones[:100]) for total in own)
    assert not host_pool._unfinished


@needs_native
def test_an_error_is_raised_by_every_wait_and_by_no_other_handle() -> None:
    run, g = run_of("bfloat16", None, 300, 4), torch.full((300,), torch.nan)
    total = torch.zeros(3)
    bad = host_adamw8bit.update(gradient=g, **run, hp=HYPER, seed=1, parameter=2)
    good = host.accumulate(total, torch.ones(3))
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="not finite"):
            bad.wait()
    good.wait()
    assert total.tolist() == [1.0, 1.0, 1.0]


def test_without_the_module_handles_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "native", None)
    monkeypatch.setattr(host, "_say_once", lambda: None)
    handle = host.accumulate(torch.zeros(3), torch.ones(3), threads=4)
    assert handle.done()
    handle.wait()
    assert handle.result() == 0.0
    assert host.instruction_sets() == []
    with pytest.raises(ValueError, match="is not among"), host.instruction_set("scalar"):
        pass


@needs_native
def test_other_python_threads_run_while_one_waits() -> None:
    """One sleeps a moment and then looks: while the other waits with Python's lock it could not go on."""
    last, seen = busy(), []

    def look() -> None:
        time.sleep(0.02)
        seen.append(last.done())

    thread = threading.Thread(target=look)
    thread.start()
    last.wait()
    thread.join()
    assert seen == [False]


# ---- threads -------------------------------------------------------------------------------------------------------


def thread_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


@linux
@needs_native
@pytest.mark.usefixtures("configured")
def test_threads_are_as_many_as_configured_and_where() -> None:
    core = max(os.sched_getaffinity(0))
    pending = busy()
    host.configure(threads=3, cores=[core])
    assert pending.done()  # configure waits
    before = thread_ids()
    total = torch.zeros(10 * 2**16)
    host.accumulate(total, torch.ones_like(total)).wait()
    new = thread_ids() - before
    assert len(new) == 3
    end = time.monotonic() + 30
    while any(os.sched_getaffinity(thread) != {core} for thread in new):  # a thread goes there when it first runs
        assert time.monotonic() < end
        time.sleep(0.01)
    host.accumulate(total, torch.ones_like(total), threads=5).wait()
    assert len(thread_ids() - before) == 5
    host.accumulate(total[:9], torch.ones(9), threads=300).wait()  # of one range: no more threads than that
    assert len(thread_ids() - before) == 5
    host.configure()
    assert not new & thread_ids()
    assert torch.equal(total[9:], torch.full_like(total[9:], 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads=0"),
        ({"threads": -2}, "threads=-2"),
        ({"cores": [-1]}, "core"),
        ({"cores": [10**6]}, "core"),
    ],
)
@pytest.mark.usefixtures("configured")
def test_wrong_threads_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host.configure(**options)
    assert host.sum_of_squares(torch.ones(5)) == 5


@pytest.mark.parametrize("threads", [0, -1])
def test_a_call_without_threads_is_refused(threads: int) -> None:
    for call in (
        lambda: host.sum_of_squares(torch.ones(5), threads=threads),
        lambda: host.round_stochastic(torch.ones(5), 1, 2, 3, threads=threads),
        lambda: host.accumulate(torch.ones(5), torch.ones(5), threads=threads),
    ):
        with pytest.raises(ValueError, match=f"threads={threads}; host kernels need at least 1"):
            call()


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'mmx' is not among"), host.instruction_set("mmx"):
        pass


@needs_native
def test_an_instruction_set_holds_inside_only() -> None:
    assert host.native is not None
    before = host.native.isa()
    assert before == (os.environ.get("LEAPALIGN_ISA") or host.instruction_sets()[-1])
    with host.instruction_set("scalar"):
        assert host.native.isa() == "scalar"
    assert host.native.isa() == before


@every_isa
def test_subnormals_are_kept_whatever_the_caller_flushes(isa: str) -> None:
    """Of weights, gradients and their sums; the caller's own arithmetic stays as it was set."""
    count = 600
    start, g = run_of("float32", torch.float32, count, 5, size=1e-39), GRADIENTS["subnormal"](count, 6)
    again, large = run_of("float32", None, count, 7, size=1e-39), randn(count, seed=8)
    expected, total, tiny = copied(start), g.clone(), torch.full((3,), 1e-40)
    expected_again = copied(again)
    adamw8bit.update(gradient=g, **expected, hp=HYPER, seed=1, parameter=2)
    adamw8bit.update(gradient=large, **expected_again, hp=HYPER, seed=1, parameter=2, scale=1e-38)  # a subnormal factor

    def flushes() -> bool:
        return float((tiny.double().float() * 1).sum()) == 0

    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that can flush subnormals")
    try:
        with host.instruction_set(isa):
            host_adamw8bit.update(gradient=g, **start, hp=HYPER, seed=1, parameter=2, threads=2).wait()
            host_adamw8bit.update(gradient=large, **again, hp=HYPER, seed=1, parameter=2, scale=1e-38).wait()
            host.accumulate(total, g, threads=2).wait()
        flushed = flushes()
    finally:
        torch.set_flush_denormal(False)
    assert flushed and not flushes()
    assert not differing(start, expected) and not differing(again, expected_again)
    assert torch.equal(total, 2 * g) and total.abs().max() > 0


# ---- processes -----------------------------------------------------------------------------------------------------


def python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    """A process that hangs fails the test after two minutes."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"LEAPALIGN_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork and timers: not Windows")
def test_interruption_fork_and_exit(tmp_path: Path) -> None:
    result = python("-m", "tests.kernels.host.host_lifetime", str(tmp_path / "total"), isa="scalar")
    assert result.returncode == 0 and not result.stderr, result.stderr
    seen = json.loads(result.stdout)
    assert seen["isa"] == "scalar"  # from the environment
    assert seen["interrupted"]  # a signal's handler runs while Python waits
    assert seen["own"] == [2.0] * 5  # a child has threads of its own
    assert not seen["parent_done"] and "before the process forked" in seen["error"]  # and no hold on its parent's work
    assert not seen["kept"]  # nor does that keep its tensors
    assert seen["child_status"] == 0
    assert not seen["done_at_the_end"]  # exit code 0 with work pending, which is done first
    total = torch.from_file(str(tmp_path / "total"), size=1000)
    assert total.tolist() == [1.0] * 1000


@needs_native
def test_an_unknown_instruction_set_in_the_environment_is_refused() -> None:
    result = python("-c", "import leapalign.kernels.host.native", isa="mmx")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: LEAPALIGN_ISA: 'mmx' is not among ['scalar'")
