"""Budget in, plan out: the fastest of all ways to run a step that fit into the given memory.

The ways are enumerated and none of them depends on the budget, so more memory never makes a plan slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from leapalign.engine.backbones import Backbone, backbone_of
from leapalign.engine.backbones.fused import not_fusable
from leapalign.engine.memory.sizes import spell_bytes
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.costs import Prospect, StepCosts
from leapalign.engine.planning.stage_costs import StageCosts
from leapalign.engine.planning.workload import Budget, Machine, Workload
from leapalign.engine.streaming.partition import meta_transformer
from leapalign.kernels.dispatch import reaches_device

EVERY = (1, 2, 4, 8)
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)  # small models need many rows, or launching their blocks takes the time
RESIDENCIES = 6  # numbers of resident blocks that are looked at, between none and all


class BudgetError(ValueError):
    """A budget that cannot hold the step.

    Attributes:
        name: "vram" or "ram", which is too little.
        limit, need: bytes of it that there are, and that the step takes at least.
        kind: "device memory" or "host memory", in words.
        batch: samples, as asked for.
        budget, workload: the nearest setting that fits: a smaller batch, else more memory.
    """

    def __init__(
        self, short: tuple[str, int, str], asked: Budget, step: Workload, budget: Budget, workload: Workload
    ) -> None:
        """
        Args:
            short: name, need and kind.
            asked, step: what was to be planned.
            budget, workload: what fits.
        """
        self.name, self.need, self.kind = short
        limit = getattr(asked, self.name)
        assert limit is not None, "something without a limit cannot be too little"
        self.limit, self.batch = int(limit), step.batch
        self.budget, self.workload = budget, workload
        self.larger = {
            name: spell_bytes(int(getattr(budget, name)))
            for name in ("vram", "ram")
            if getattr(budget, name) != getattr(asked, name)
        }
        what = "the step" if step.legs else "sampling"
        self.needs = f"{what} needs {spell_bytes(self.need)} of {self.kind}"
        if self.larger:
            way = f"whatever the batch; give {' and '.join(f'{name} {size}' for name, size in self.larger.items())}"
        else:
            way = f"lower the batch from {self.batch} to {workload.batch}"
        joint = ", " if self.larger else "; "
        super().__init__(f"{self.name} = {spell_bytes(self.limit)} is too little: {self.needs}{joint}{way}")


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
            workload = self.workload = replace(workload, kernels=_kernels(workload, model))
            model = backbone_of(model, hoist=hoist, device=torch.device("meta"), kernels=workload.kernels)
        self.costs = StageCosts(model, workload)

    def plan(self, budget: Budget) -> MemoryPlan:
        """See `plan_memory`."""
        found = next((each for each in self._best if fits(each, budget)), None)
        if found is None:
            raise self._refusal(budget)
        return self._steps.plan(found)

    def shortage(self, budget: Budget) -> dict[str, str]:
        """{"vram" or "ram": size} that the budget has to grow to for the nearest plan to fit; empty if one does."""
        return self._smallest_budget(budget, list(self._prospects(self.workload, least=True)))

    def plans(self) -> list[MemoryPlan]:
        """All plans, whatever they need."""
        return [self._steps.plan(prospect) for prospect in self._prospects(self.workload)]

    @cached_property
    def _best(self) -> list[Prospect]:
        """Those that no other one beats in seconds, device and host bytes alike; fastest first."""
        found: list[Prospect] = []
        every = self._prospects(self.workload)
        for each in sorted(every, key=lambda e: (e.seconds, e.peak_device_bytes, e.peak_host_bytes)):
            device, host = each.peak_device_bytes, each.peak_host_bytes
            if not any(other.peak_device_bytes <= device and other.peak_host_bytes <= host for other in found):
                found.append(each)
        return found

    @cached_property
    def _steps(self) -> StepCosts:
        return StepCosts(self.costs, self.workload, self.machine)

    def _prospects(self, workload: Workload, *, least: bool = False) -> Iterator[Prospect]:
        """Of every combination of decisions; with `least` only of those that need least memory of their kind."""
        steps = self._steps if workload == self.workload else StepCosts(self.costs, workload, self.machine)
        for choice in self._choices(workload, least=least):
            yield from steps.prospects(choice)

    def _choices(self, workload: Workload, *, least: bool) -> Iterator[MemoryPlan]:
        """The reward's decisions apart."""
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
        if workload.mode is None and workload.dtype.itemsize < 4 and not workload.holds:
            modes = ["paired"]  # held, the first leg's gradients would be rounded to the weights' dtype
        if not workload.first_passes:
            modes = modes[:1]  # all legs run in one pass
        updates = workload.legs and workload.optimizer == "adamw8bit"
        places: list[Any] = ["host", "device"] if updates else ["host"]
        if workload.optimizer_on and updates:
            places = [workload.optimizer_on]
        keeping = [
            (mode, keep)
            for mode in modes
            for keep in ([True, False] if mode == "held" and workload.first_passes else [True])
        ]  # paired legs' inputs are kept from pass to pass in any case
        every = [step for step in EVERY if step <= blocks] if workload.legs else [1]
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
                kernels="triton" if self.costs.backbone.fused else "torch",
                attention=workload.attention,
            )

    # ---- refusals --------------------------------------------------------------------------------------------------

    def _refusal(self, budget: Budget) -> BudgetError:
        """What is missing, and the nearest setting that fits: the largest batch, else the smallest budget."""
        plans = self._best
        device = min(plan.peak_device_bytes for plan in plans)
        host = min(plan.peak_host_bytes for plan in plans)
        if device > budget.device_bytes:
            short = ("vram", device, "device memory")
        elif host > budget.host_bytes:
            short = ("ram", host, "host memory")
        else:  # each alone is enough
            within = [plan.peak_device_bytes for plan in plans if plan.peak_host_bytes <= budget.host_bytes]
            short = ("vram", min(within), "device memory, with that much host memory")
        if batch := self._largest_batch(budget):
            return BudgetError(short, budget, self.workload, budget, self.workload.with_batch(batch))
        larger = Budget(**{"vram": budget.vram, "ram": budget.ram, **self._smallest_budget(budget, plans)})
        return BudgetError(short, budget, self.workload, larger, self.workload)

    def _largest_batch(self, budget: Budget) -> int:
        """The largest batch below the workload's that fits; 0 if none does."""

        def possible(batch: int) -> bool:
            found = self._prospects(self.workload.with_batch(batch), least=True)
            return any(fits(prospect, budget) for prospect in found)

        low, high = 0, self.workload.batch  # low fits (or is 0), high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if possible(middle) else (low, middle)
        return low

    def _smallest_budget(self, budget: Budget, plans: list[Prospect]) -> dict[str, str]:
        """What has to grow, and to what: the plan for which memory grows by the least factor."""

        def growth(plan: Prospect) -> float:
            device, host = plan.peak_device_bytes, plan.peak_host_bytes
            return max(device / budget.device_bytes, 1) * max(host / budget.host_bytes, 1)

        best = min(plans, key=growth)
        found = {}
        if best.peak_device_bytes > budget.device_bytes:
            found["vram"] = spell_bytes(best.peak_device_bytes)
        if best.peak_host_bytes > budget.host_bytes:
            found["ram"] = spell_bytes(best.peak_host_bytes)
        return found


def _kernels(workload: Workload, model: nn.Module) -> Literal["triton", "torch"]:
    if workload.kernels != "auto":
        return workload.kernels
    gpu = torch.cuda.is_available() and reaches_device(torch.device("cuda"))
    return "triton" if gpu and not_fusable(model) is None else "torch"


def fits(plan: MemoryPlan | Prospect, budget: Budget) -> bool:
    """Whether the plan's predicted peaks are within the budget."""
    return plan.peak_device_bytes <= budget.device_bytes and plan.peak_host_bytes <= budget.host_bytes
