"""The stages of `python -m bench gpu`.

A stage is a function of a `Context`: it emits rows as they come and raises what makes it fail. Nothing of CUDA is
touched before a stage does it, so that a stage that comes first in its process finds the device as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from leapalign.engine.memory.arena import HostArena
from leapalign.engine.memory.sizes import parse_bytes

RESOLUTIONS = (512, 1024)
RAM = "112GiB"  # of the host that plans may take, where it has so much
OVER = 64 * 2**20  # bytes by which ballast may leave more than the cap: what it takes is whole pages
REPEATS = 2
LENGTHS = (1, 2, 3, 5, 10, 25)
A_POINT = 15  # seconds that a model of SD3.5-M's size may take to be made and to step
A_KERNEL = 30  # seconds that an operation may take: it is compiled and timed in three ways and more
TINY_KERNELS = ("gated f", "leap b", "sum")


class EndError(Exception):
    """A stage that ran to its end and has not passed; its text says why."""

    status: str


class FailedError(EndError):
    """Something is wrong."""

    status = "failed"


class UnfinishedError(EndError):
    """Nothing is wrong, but there was no time for all of it; --resume goes on."""

    status = "unfinished"


class SkippedError(EndError):
    """This device cannot do it."""

    status = "skipped"


@dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
        tiny: toy sizes on the CPU.
        deadline: on the clock of `time.monotonic`: when the stage has to have ended.
        done: keys of the rows that are there already.
        emit: keeps a row, {"key": ..., ...}.
    """

    tiny: bool
    deadline: float
    done: Collection[str] = ()
    emit: Callable[[dict[str, Any]], None] = field(default=lambda row: None)

    @property
    def device(self) -> torch.device:
        """What is tested; asking touches nothing."""
        return torch.device("cpu") if self.tiny else torch.device("cuda", 0)

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


# ---- what is tested and measured -----------------------------------------------------------------------------------


def correctness(context: Context) -> None:
    """bench/gpu/correctness.py."""
    from bench.gpu.correctness import checked, checks

    failed = []
    for key, check in checks(context.device, wide=not context.tiny):
        if key not in context.done:
            row = checked(key, check)
            context.emit(row)
            failed += [] if row["passed"] else [key]
    if failed:
        raise FailedError(f"{len(failed)} checks failed: {'; '.join(failed[:5])}")


def ceilings(context: Context) -> None:
    """Rates of engine/planning/rates.py: what no step can be faster than."""
    from leapalign.engine.planning import rates

    seconds = 0.1 if context.tiny else 2.0
    for key, measure in {
        "matrix product": lambda: {"flops_per_s": rates.matmul_flops_per_s(context.device, seconds=seconds)},
        "copies": lambda: asdict(rates.copy_rates(context.device, seconds=seconds)),
        "host": lambda: asdict(rates.host_rates(seconds=seconds)),
    }.items():
        if key not in context.done:
            context.emit({"key": key, **measure()})


def step_24(context: Context) -> None:
    """FLUX.1-dev's size under 24 GiB."""
    _steps(context, "24GiB")


def step_48(context: Context) -> None:
    """FLUX.1-dev's size under 48 GiB."""
    _steps(context, "48GiB")


def kernel_times(context: Context) -> None:
    """`bench kernels`, an operation at a time, as far as the seconds last."""
    from bench.kernels.command import rows

    there, missed, failed = set(context.done), set(), []

    def wanted(name: str, resolution: int | None) -> bool:
        key = f"{name} {resolution}"
        if key in there or (context.tiny and not name.startswith(TINY_KERNELS)):
            return False
        if context.left() > (0 if context.tiny else A_KERNEL):
            return True
        missed.add(key)  # what does not depend on the resolution is asked for at each
        return False

    for resolution in [64] if context.tiny else RESOLUTIONS:
        for row in rows([resolution], context.device, context.tiny, wanted):
            key = f"{row['operation']} {row['dtype']} {row['resolution']}"
            there.add(key)
            failed += [key] if row.get("faults") else []
            # without a measurement it is no operation of the report's tables
            context.emit({"key": key, **(row if "ways" in row else {"faults": row["faults"]})})
    late = [f"no time for {len(missed)} operations"] if missed else []
    if failed:
        raise FailedError("; ".join([f"{len(failed)} operations failed: {', '.join(failed[:5])}", *late]))
    if late:
        raise UnfinishedError(late[0])


def ways(context: Context) -> None:
    """`bench throughput` at a size of which everything fits on the device: a quarter of FLUX.1-dev."""
    from bench.speed import random_models
    from bench.speed.throughput import TINY_CAP

    if context.tiny:
        _throughput(context, random_models.tiny(), (TINY_CAP,), ("streamed", "resident", "plain"))
    else:
        sizes = random_models.flux1_dev().with_blocks(5, 10)
        _throughput(context, sizes, ("8GiB", "24GiB"), ("streamed", "resident", "plain"))


def whole_ways(context: Context) -> None:
    """The same of all of FLUX.1-dev, for the ways that hold it on the device."""
    from bench.speed import random_models

    sizes = random_models.tiny() if context.tiny else random_models.flux1_dev()
    _throughput(context, sizes, (), ("plain",) if context.tiny else ("resident", "plain"))


def _throughput(context: Context, sizes: Any, caps: tuple[str, ...], kinds: tuple[str, ...]) -> None:
    from bench.speed.step_variants import Task
    from bench.speed.throughput import Measurement

    microbatch, repeats = (1, 1) if context.tiny else (None, REPEATS)
    task = Task(sizes, sizes.resolution, sizes.batch, sizes.steps, context.device, microbatch)
    measurement = Measurement(task, kinds, caps, RAM, repeats)
    waiting, failed = [name for name in measurement.names() if name not in context.done], []
    while waiting:  # they share what is left
        deadline = time.monotonic() + context.left() / len(waiting)
        measurement.left = lambda deadline=deadline: deadline - time.monotonic()  # type: ignore[misc]
        row = measurement.row(waiting.pop(0))
        wrong = [row["failed"]] if "failed" in row else row.get("faults", [])
        context.emit({"key": row["way"], **measurement.rates, **row, "faults": wrong})
        failed += [f"{row['way']}: {fault}" for fault in wrong]
    if failed:
        raise FailedError("; ".join(failed))


def trajectory(context: Context) -> None:
    """`bench memory --trajectory --gpu` of SD3.5-M, as far as the seconds last."""
    from bench.memory import trajectory as curves
    from bench.memory.trajectory_measured import allocated, live_bytes

    name, lengths, pixels = ("shapes", (1, 2), 32) if context.tiny else ("sd35_medium", LENGTHS, 512)
    if name in context.done:
        return
    missed = 0

    def point(workload: Any, method: str) -> Mapping[str, float]:
        nonlocal missed
        if context.tiny:
            return live_bytes(workload, method)
        if context.left() < A_POINT:
            missed += 1
            return {}
        return allocated(workload, method, context.device)

    base = curves.plain(name, resolution=pixels, steps=lengths[-1])
    found = curves.trajectory(curves.Axes([base], [base], [base]), lengths, point, progress=print)
    wrong = [f"no time for {missed} points"] if missed else []
    context.emit({"key": name, "model": name, "how": "measured", **found, "faults": wrong})
    if wrong:
        raise UnfinishedError(wrong[0])


# ---- steps of FLUX.1-dev's size ------------------------------------------------------------------------------------


def _steps(context: Context, cap: str) -> None:
    from bench.gpu.ballast import ballast
    from bench.speed.step_variants import cap_on, card_bytes, host_bytes

    limit = parse_bytes(cap)
    faults: list[str] = []
    with ExitStack() as stack:
        taken: dict[str, Any] = {}
        if not context.tiny:
            try:
                taken = dict(stack.enter_context(ballast(limit)))
            except RuntimeError as error:  # the allocator is held to the cap all the same
                taken = {"none": str(error)}
        try:
            limit = cap_on(card_bytes(context.device), limit)  # asked after the ballast is made
        except ValueError as error:
            raise SkippedError(f"cap {cap}: {error}") from None
        arenas, ram = Arenas(), host_bytes(RAM)  # before the arenas take it
        for number, resolution in enumerate(RESOLUTIONS):
            if str(resolution) not in context.done:
                share = context.left() / (len(RESOLUTIONS) - number)
                row = _step(context, cap, limit, resolution, arenas, time.monotonic() + share, ram)
                wrong = [*_faults(row), *_ballast_faults(taken, limit)]
                context.emit({"key": str(resolution), **row, "ballast": taken, "faults": wrong})
                faults += [f"{resolution} pixels: {fault}" for fault in wrong]
    if faults:
        raise FailedError("; ".join(faults))


def _step(
    context: Context, cap: str, limit: int, resolution: int, arenas: Arenas, deadline: float, ram: int | None
) -> dict[str, Any]:
    from bench.speed import random_models
    from bench.speed.step_timing import machine_here, measured, outcome
    from bench.speed.step_variants import Task, planner_of, streamed
    from bench.speed.throughput import TINY_CAP

    sizes, device, pixels = random_models.flux1_dev(), context.device, resolution
    if context.tiny:
        sizes, pixels = random_models.tiny(), resolution // 32
        limit = parse_bytes(TINY_CAP if cap == "24GiB" else "1GiB")
    task = Task(sizes, pixels, sizes.batch, sizes.steps, device, 1 if context.tiny else None)
    machine, rates = machine_here(device, seconds=0.1 if context.tiny else 0.6)
    arenas.again()

    def step() -> dict[str, Any]:
        planner = planner_of(task, machine)
        return measured(
            lambda: streamed(task, planner, limit, ram, arena=arenas),
            rates["matmul_flops_per_s"],
            1 if context.tiny else REPEATS,
            lambda: deadline - time.monotonic(),
        )

    row = outcome(step, device, limit)
    left = {}
    if not context.tiny and "failed" not in row:  # a device that is broken tells nothing
        left = {"free_bytes": torch.cuda.mem_get_info(device)[0], "reserved_bytes": torch.cuda.memory_reserved(device)}
    head = {"way": f"{resolution} pixels, {cap}", "cap_bytes": limit, "task": task.described()}
    return {**head, "ram_bytes": ram, **rates, **row, "afterwards": left}


def _faults(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a step, or why there is none."""
    from bench.speed.step_timing import faults_of

    if "failed" in row or "refused" in row:
        return [row.get("failed") or row["refused"]]
    if "out_of_memory_bytes" in row:
        return [f"out of memory: {row['allocator']}"]
    return faults_of(row)


def _ballast_faults(taken: Mapping[str, Any], limit: int) -> list[str]:
    """That more of the device was free beside the ballast than the cap."""
    left = taken.get("left", 0)
    return [f"the ballast left {left / 2**30:.2f} GiB, the cap is {limit / 2**30:.2f}"] if left > limit + OVER else []


class Arenas:
    """Makes host memory, and gives it to the next model of the same shape again: 48 GB take long to be pinned."""

    def __init__(self) -> None:
        self._made: list[tuple[dict[str, int], HostArena]] = []
        self._free: list[tuple[dict[str, int], HostArena]] = []

    def again(self) -> None:
        """The model that had them is gone."""
        self._free = list(self._made)
        for _, arena in self._free:
            for region in arena.values():
                region.zero_()

    def __call__(self, sizes: Mapping[str, int]) -> Mapping[str, Tensor]:
        found = next((each for each in self._free if each[0] == sizes), None)
        if found is not None:
            self._free.remove(found)
            return found[1]
        arena = HostArena(sizes)  # pinned where there is a GPU
        self._made.append((dict(sizes), arena))
        return arena
