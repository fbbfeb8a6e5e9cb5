"""Budget in, plan out: the fastest of all ways to run a step that fit into the given memory.

The ways are enumerated and none of them depends on the budget, so more memory never makes a plan slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leapalign.engine.backbones import Backbone, backbone_of
from leapalign.engine.cost import variants
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.sizes import spell_bytes
from leapalign.engine.stage_costs import StageCosts
from leapalign.engine.units import meta_transformer
from leapalign.engine.workload import Budget, Machine, Workload

EVERY = (1, 2, 4, 8)
MICROBATCHES = (1, 2, 4, 8)
RESIDENCIES = 6  # numbers of resident blocks that are looked at, between none and all


class BudgetError(ValueError):
    """A budget that cannot hold the step.

    Attributes:
        budget, workload: the nearest setting that fits, as the message says.
    """

    def __init__(self, message: str, budget: Budget, workload: Workload) -> None:
        super().__init__(message)
        self.budget, self.workload = budget, workload


def plan_memory(
    model: nn.Module | Backbone | Mapping[str, Any] | Path | str,
    budget: Budget | None = None,
    workload: Workload | None = None,
    machine: Machine | None = None,
) -> MemoryPlan:
    """The fastest plan whose predicted peaks fit; of equally fast ones the one with least device memory.

    Args:
        model: FLUX or SD3 transformer (its weights are not read), a backbone on meta, or what is in a diffusers
            transformer's config.json: as a dictionary, the file or its folder.
        budget: None for no limit.
        workload: of one step. A module's own dtype takes the place of the workload's.
        machine: rates.

    Raises:
        BudgetError: a ValueError that names what is needed, the limit, and the nearest setting that fits.
        ValueError: another kind of model.
    """
    budget, workload = budget or Budget(), workload or Workload()
    if isinstance(model, nn.Module):
        workload = replace(workload, dtype=next(model.parameters()).dtype)
    return Planner(model, workload, machine).plan(budget)


class Planner:
    """All ways to run one workload, counted once, to be chosen from by budget."""

    def __init__(
        self,
        model: nn.Module | Backbone | Mapping[str, Any] | Path | str,
        workload: Workload,
        machine: Machine | None = None,
        *,
        hoist: bool = True,
    ) -> None:
        """
        Args:
            hoist: as in `MemoryPlan`; a backbone brings its own.
        """
        self.workload, self.machine = workload, machine or Machine()
        if isinstance(model, Mapping | Path | str):
            model = meta_transformer(model, workload.dtype)
        if isinstance(model, nn.Module):
            model = backbone_of(model, hoist=hoist, device=torch.device("meta"))
        self.costs = StageCosts(model, workload)

    def plan(self, budget: Budget) -> MemoryPlan:
        """See `plan_memory`."""
        found = next((plan for plan in self._best if fits(plan, budget)), None)
        if found is None:
            raise self._refusal(budget)
        return found

    @cached_property
    def _best(self) -> list[MemoryPlan]:
        """The plans that no other one beats in seconds, device and host bytes alike; fastest first."""
        found: list[MemoryPlan] = []
        for plan in sorted(self.plans(), key=lambda p: (p.seconds, p.peak_device_bytes, p.peak_host_bytes)):
            device, host = plan.peak_device_bytes, plan.peak_host_bytes
            if not any(p.peak_device_bytes <= device and p.peak_host_bytes <= host for p in found):
                found.append(plan)
        return found

    def plans(self) -> list[MemoryPlan]:
        """All plans, whatever they need."""
        choices = self._choices(self.workload)
        return [plan for choice in choices for plan in self._variants(choice, self.workload)]

    def _choices(self, workload: Workload, *, least: bool = False) -> Iterator[MemoryPlan]:
        """Every combination of decisions; with `least` only those that need least memory of their kind."""
        blocks = len(self.costs.parts) - 2
        numbers = {1, *(round(index * blocks / RESIDENCIES) for index in range(RESIDENCIES + 1))} - {0, blocks}
        residencies: list[Any] = ["none"] if least else ["none", *sorted(numbers), "all"]
        microbatches = [rows for rows in MICROBATCHES if rows < workload.batch]
        microbatches = [*microbatches, workload.batch] if workload.batch <= MICROBATCHES[-1] else microbatches
        if workload.microbatch is not None:
            microbatches = [workload.microbatch]
        elif least:
            microbatches = [1]
        modes: list[Any] = [workload.mode] if workload.mode else ["paired", "held"]
        if not workload.first_passes:
            modes = modes[:1]  # all legs run in one pass
        places: list[Any] = ["host", "device"] if workload.optimizer == "adamw8bit" else ["host"]
        if workload.optimizer_on and workload.optimizer == "adamw8bit":
            places = [workload.optimizer_on]
        keeping = [
            (mode, keep)
            for mode in modes
            for keep in ([True, False] if mode == "held" and workload.first_passes else [True])
        ]  # paired legs' inputs are kept from pass to pass in any case
        every = [step for step in EVERY if step <= blocks]
        homes: list[Any] = ["device", "host"]
        for resident, rows, states, step, (mode, keep), place in product(
            residencies, microbatches, homes, every, keeping, places
        ):
            yield MemoryPlan(
                microbatch=rows,
                resident=resident,
                block_inputs=states,
                every=step,
                hoist=self.costs.hoisted,
                mode=mode,
                keep_block_inputs=keep,
                optimizer_on=place,
            )

    def _variants(self, choice: MemoryPlan, workload: Workload) -> Iterator[MemoryPlan]:
        return variants(self.costs, choice, workload, self.machine)

    # ---- refusals --------------------------------------------------------------------------------------------------

    def _refusal(self, budget: Budget) -> BudgetError:
        """What is missing, and the nearest setting that fits: the largest batch, else the smallest budget."""
        plans = self._best
        device = min(plan.peak_device_bytes for plan in plans)
        host = min(plan.peak_host_bytes for plan in plans)
        if device > budget.device_bytes:
            what, need, limit = "device memory", device, budget.vram
        elif host > budget.host_bytes:
            what, need, limit = "host memory", host, budget.ram
        else:  # each alone is enough
            within = [plan for plan in plans if plan.peak_host_bytes <= budget.host_bytes]
            what, limit = "device memory, with that much host memory", budget.vram
            need = min(plan.peak_device_bytes for plan in within)
        name = "ram" if what == "host memory" else "vram"
        assert limit is not None
        short = f"{name}={spell_bytes(int(limit))} is too little: the step needs {spell_bytes(need)} of {what}"
        batch = self._largest_batch(budget)
        if batch:
            return BudgetError(f"{short}; lower the batch from {self.workload.batch} to {batch}", budget,
                               self.workload.with_batch(batch))  # fmt: skip
        needed = self._smallest_budget(budget, plans)
        texts = " and ".join(f"{name} {value}" for name, value in needed.items())
        larger = Budget(**{"vram": budget.vram, "ram": budget.ram, **needed})
        return BudgetError(f"{short}, whatever the batch; give {texts}", larger, self.workload)

    def _largest_batch(self, budget: Budget) -> int:
        """The largest batch below the workload's that fits; 0 if none does."""

        def possible(batch: int) -> bool:
            workload = self.workload.with_batch(batch)
            choices = self._choices(workload, least=True)
            return any(fits(plan, budget) for choice in choices for plan in self._variants(choice, workload))

        low, high = 0, self.workload.batch  # low fits (or is 0), high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if possible(middle) else (low, middle)
        return low

    def _smallest_budget(self, budget: Budget, plans: list[MemoryPlan]) -> dict[str, str]:
        """What has to grow, and to what: the plan for which memory grows by the least factor."""

        def growth(plan: MemoryPlan) -> float:
            device, host = plan.peak_device_bytes, plan.peak_host_bytes
            return max(device / budget.device_bytes, 1) * max(host / budget.host_bytes, 1)

        best = min(plans, key=growth)
        found = {}
        if best.peak_device_bytes > budget.device_bytes:
            found["vram"] = spell_bytes(best.peak_device_bytes)
        if best.peak_host_bytes > budget.host_bytes:
            found["ram"] = spell_bytes(best.peak_host_bytes)
        return found


def fits(plan: MemoryPlan, budget: Budget) -> bool:
    """Whether the plan's predicted peaks are within the budget."""
    return plan.peak_device_bytes <= budget.device_bytes and plan.peak_host_bytes <= budget.host_bytes
