"""Times the ways of bench/speed/step_variants.py: a short step that allocates, a watched one, those that count.

Medians are reported, and as spread what lies between the quickest step and the slowest, relative to the median. FLOP/s
are those of the arithmetic that a way carries out, what it computes twice counted twice (engine/planning/counting.py:
matrix products, convolutions, attention); `of_matmul` is their share of a bfloat16 matrix product's in the same run.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from bench.speed.movement import watched
from bench.speed.step_variants import Step, Streamed, Way
from leapalign.engine.ledger import Measured
from leapalign.engine.planning.planner import BudgetError
from leapalign.engine.planning.rates import copy_rates, host_rates, matmul_flops_per_s
from leapalign.engine.planning.workload import Machine
from leapalign.planning.workload import machine_of

SHORT = 4  # rollout steps of the first two steps, at most
_DECISIONS = ("microbatch", "resident", "block_inputs", "every", "mode", "optimizer_on", "reward_residency",
              "reward_microbatch", "checkpoint_reward", "kernels")  # fmt: skip

Left = Callable[[], float]  # seconds that there are


def machine_here(device: torch.device, *, seconds: float = 1.0) -> tuple[Machine, dict[str, float]]:
    """Rates for plans, and those to be reported: of a GPU measured ones; a CPU's only put plans in order."""
    matmul = matmul_flops_per_s(device, seconds=seconds)
    if device.type != "cuda":
        return machine_of(device), {"matmul_flops_per_s": matmul}
    copies, host = copy_rates(device, seconds=seconds), host_rates(seconds=seconds)
    h2d, d2h, update = copies.h2d_together, copies.d2h_together, host.in_place
    machine = Machine(flops_per_s=matmul, h2d_bytes_per_s=h2d, d2h_bytes_per_s=d2h, host_bytes_per_s=update)
    rates = {"h2d_bytes_per_s": h2d, "d2h_bytes_per_s": d2h, "host_bytes_per_s": update}
    return machine, {"matmul_flops_per_s": matmul, **rates}


def measured(make: Callable[[], Way], matmul: float, repeats: int, left: Left) -> dict[str, Any]:
    """Make a way, run its steps, and close it.

    Args:
        matmul: FLOP/s of a matrix product.
        repeats: timed steps, at most; one at least.
        left: the rollout is shortened so that two steps fit into these seconds.

    Raises:
        BudgetError: there is no plan.
        torch.OutOfMemoryError: not even one image at once fits.
    """
    began = time.perf_counter()
    way = make()
    ready = time.perf_counter() - began
    try:
        wanted = way.task.steps
        before, short = way.sample(), min(SHORT, wanted)
        first = _first(way, short)
        second, movement = _watched(way, short)
        steps = rollout_steps(second, short, wanted, left() / 2)
        timed = [way.step(2, steps)]
        while len(timed) < repeats and 1.2 * timed[-1].total < left():
            timed.append(way.step(2 + len(timed), steps))
        changed = [float((was != now).float().mean()) for was, now in zip(before, way.sample(), strict=True)]
        head = {"seconds_to_make": ready, "seconds_of_first_step": first.total, "weights_changed": changed}
        return head | numbers(way, timed, steps, matmul) | {"movement": movement}
    finally:
        way.close()


def outcome(measure: Callable[[], dict[str, Any]], device: torch.device, limit: int) -> dict[str, Any]:
    """What `measure` gives, or why it gave nothing; the device is free again afterwards.

    Args:
        measure: `measured` of a way.
        limit: bytes of the device that it may have.

    Returns:
        its row, or {"refused": why there is no plan}, {"out_of_memory_bytes": limit, "allocator": what it said} or
        {"failed": any other error}, whose traceback goes to standard error: other ways are still to be measured.
    """
    try:
        row = measure()
    except BudgetError as error:
        row = {"refused": str(error)}
    except torch.OutOfMemoryError as error:
        row = {"out_of_memory_bytes": limit, "allocator": _first_line(error)}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        row = {"failed": f"{type(error).__name__}: {_first_line(error)}"}
    try:
        collect(device)
    except RuntimeError:
        if "failed" not in row:  # else the device is broken, and it has been told why
            raise
    return row


def faults_of(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with the numbers of `measured`."""
    found = [] if all(map(math.isfinite, row["losses"])) else ["the loss is not finite"]
    found += [] if all(row["weights_changed"]) else ["weights have not changed"]
    for phase in row.get("over_plan", ()):
        took, planned = (part[phase]["device_bytes"] for part in (row["memory"], row["planned"]))
        found.append(f"{phase} took {took / 2**30:.2f} GiB, {planned / 2**30:.2f} were planned")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def rollout_steps(step: Step, short: int, wanted: int, seconds: float) -> int:
    """How many rollout steps fit into so many seconds, by a step with a short rollout; no fewer than that one had."""
    rollout = step.seconds["rollout"]
    spare = seconds - (step.total - rollout)
    return wanted if spare * short >= wanted * rollout else max(short, int(spare * short / rollout))


def numbers(way: Way, timed: Sequence[Step], steps: int, matmul: float) -> dict[str, Any]:
    """What the timed steps, with rollouts of so many steps, come to."""
    totals = [step.total for step in timed]
    seconds = {phase: median(step.seconds[phase] for step in timed) for phase in timed[0].seconds}
    total, flops = median(totals), way.flops(steps)
    found: dict[str, Any] = {
        "steps": steps,
        "timed": len(timed),
        "seconds": {**seconds, "total": total},
        "spread": (max(totals) - min(totals)) / total if len(totals) > 1 else None,
        "seconds_an_evaluation": seconds["rollout"] / steps,
        "images_per_s": way.task.batch / total,
        "flops": flops,
        "flops_per_s": flops / total,
        "of_matmul": flops / total / matmul,
        "losses": [step.loss for step in timed],
        "optimizer": way.optimizer_name,
        "microbatch": way.microbatch,
        "peak_device_bytes": _most(way.memory),
        "memory": {phase: asdict(most) for phase, most in way.memory.items()},
    }
    return found | (_beside_the_plan(way, steps) if isinstance(way, Streamed) else {})


def collect(device: torch.device) -> None:
    """Give back what a way had, and let the next one have all of the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _first(way: Way, steps: int) -> Step:
    """The first step, with as many images at once as fit."""
    while True:
        try:
            return way.step(0, steps)
        except torch.OutOfMemoryError:
            if not way.smaller():
                raise
        gc.collect()  # now that nothing refers to the step's tensors any more
        torch.cuda.empty_cache()


def _watched(way: Way, steps: int) -> tuple[Step, dict[str, Any] | None]:
    """A step, and what its copies took where there are any."""
    if not isinstance(way, Streamed):
        return way.step(1, steps), None
    with watched(way.model.streamer) as watch:
        step = way.step(1, steps)
    movement = watch.movement()
    gpu = way.task.device.type == "cuda"  # a CPU's copies take the cores from what they are to overlap with
    return step, {"steps": steps, **asdict(movement), "overlap": movement.overlap if gpu else None}


def _beside_the_plan(way: Streamed, steps: int) -> dict[str, Any]:
    """What was planned for such a step. Bytes are without what no allocator shows."""
    plan = way.predicted(steps)
    planned = {
        phase.name: {
            "device_bytes": phase.device_bytes - phase.breakdown.get("device: base", 0),
            "host_bytes": phase.host_bytes,
            "h2d_bytes": phase.h2d_bytes,
            "d2h_bytes": phase.d2h_bytes,
            "seconds": phase.seconds,
        }
        for phase in plan.phases
    }
    copied = {f"{way_}_bytes": sum(phase[f"{way_}_bytes"] for phase in planned.values()) for way_ in ("h2d", "d2h")}
    return {
        "microbatch": plan.microbatch,
        "plan": {name: getattr(plan, name) for name in _DECISIONS},
        "planned": planned,
        "planned_peak_bytes": max(int(phase["device_bytes"]) for phase in planned.values()),
        "planned_seconds": plan.seconds,
        "planned_copies": copied,
        "copies": way.copied,
        "over_plan": over_plan(way.memory, planned),
    }


def over_plan(memory: Mapping[str, Measured], planned: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The phases that took more device memory than planned."""
    return [
        name
        for name, most in memory.items()
        if most.device_bytes is not None and name in planned and most.device_bytes > planned[name]["device_bytes"]
    ]


def _most(memory: Mapping[str, Measured]) -> int | None:
    return max((most.device_bytes for most in memory.values() if most.device_bytes is not None), default=None)
