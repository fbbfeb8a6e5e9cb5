"""What a step takes under a plan: the peak of each phase, bytes copied, FLOPs and seconds.

Bytes are in footprint.py, traffic and seconds in traffic.py; here they become phases. The same numbers without what
they consist of (`Prospect`) are what a planner compares by the thousand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from leapalign.engine.plan import MemoryPlan, PhaseCost
from leapalign.engine.planning.footprint import Footprint
from leapalign.engine.planning.planned_step import Known, PlannedStep
from leapalign.engine.planning.stage_costs import StageCosts
from leapalign.engine.planning.traffic import Movements, Reward, Total
from leapalign.engine.planning.workload import Machine, Workload

Residency = Literal["on", "off"]
RESIDENCIES: tuple[Residency, ...] = ("on", "off")
REWARD_ROWS = (1, 2, 4, 8)  # pictures that a reward takes at once, and the whole batch
REWARD_BATCH = 64  # up to so many


@dataclass(frozen=True, slots=True)
class Prospect:
    """A plan's peaks and seconds, as `MemoryPlan` has them, before anybody asks for its phases.

    Attributes:
        choice: its decisions, apart from the reward's.
        reward, residency: these.
    """

    seconds: float
    peak_device_bytes: int
    peak_host_bytes: int
    choice: MemoryPlan
    reward: Reward | None
    residency: Residency


def predict(costs: StageCosts, plan: MemoryPlan, workload: Workload, machine: Machine | None = None) -> MemoryPlan:
    """The plan with its predictions.

    Args:
        costs: of the same model; hoisted as the plan says, with the workload's resolution and dtype.
    """
    return StepCosts(costs, workload, machine or Machine()).predict(plan)


class StepCosts:
    """Predictions for one workload on one machine; what depends on some decisions only is computed once."""

    def __init__(self, costs: StageCosts, workload: Workload, machine: Machine) -> None:
        self._costs, self._workload, self._machine = costs, workload, machine
        self._known: Known = {}

    def predict(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan with its predictions."""
        loads = sorted(self._workload.rewards, key=lambda load: load.checkpointed != plan.checkpoint_reward)
        rows = min(plan.reward_microbatch, self._workload.batch)
        return self._prediction(plan).plan(Reward(loads[0], rows) if loads else None, plan.reward_residency)

    def prospects(self, choice: MemoryPlan) -> Iterator[Prospect]:
        """The choice with every way of running the reward that is worth a look."""
        return self._prediction(choice).prospects(self._rewards)

    def plan(self, prospect: Prospect) -> MemoryPlan:
        """With its phases."""
        return self._prediction(prospect.choice).plan(prospect.reward, prospect.residency)

    def _prediction(self, plan: MemoryPlan) -> _Prediction:
        return _Prediction(PlannedStep(self._costs, plan, self._workload, self._known), self._machine)

    @cached_property
    def _rewards(self) -> list[Reward]:
        """Those that no other one beats in seconds and device bytes alike."""
        workload = self._workload
        rows = [count for count in REWARD_ROWS if count < workload.batch]
        if workload.batch <= REWARD_BATCH:
            rows.append(workload.batch)
        if workload.microbatch is not None:
            rows = [workload.microbatch]
        movements = Movements(PlannedStep(self._costs, MemoryPlan(), workload, self._known), self._machine)
        ways = [Reward(load, count) for load in workload.rewards for count in rows]
        front: list[Reward] = []
        seconds = {way: movements.reward(way, "on", 0).seconds for way in ways}
        for way in sorted(ways, key=lambda way: (seconds[way], way.device_bytes)):
            if not front or way.device_bytes < front[-1].device_bytes:
                front.append(way)
        return front


class _Prediction:
    """One plan's."""

    def __init__(self, setting: PlannedStep, machine: Machine) -> None:
        self._of, self._machine = setting, machine
        self._bytes, self._moved = Footprint(setting, machine.device_base_bytes), Movements(setting, machine)
        self._phases = list(self._all_phases())  # all but the reward's
        self._place = sum(name in ("hoist", "rollout") for name, _, _ in self._phases)  # of the reward, behind these

    def prospects(self, rewards: Sequence[Reward]) -> Iterator[Prospect]:
        """One for each way of running the reward; one alone without rewards."""
        of, host = self._of, sum(self._bytes.host.values())
        seconds = [self._seconds(name, total) for name, _, total in self._phases]
        peak = max((sum(device.values()) for _, device, _ in self._phases), default=0)
        if not rewards:
            yield Prospect(round(sum(seconds), 6), peak, host, of.plan, None, of.plan.reward_residency)
        for residency in RESIDENCIES:
            beside = self._bytes.beside_reward(residency)
            rest = sum(beside.values())
            for reward in rewards:
                own = self._seconds("reward", self._reward_traffic(reward, residency))
                whole = sum([*seconds[: self._place], own, *seconds[self._place :]])  # in order: the same last bits
                device = max(peak, rest + reward.device_bytes)
                yield Prospect(round(whole, 6), device, host, of.plan, reward, residency)

    def plan(self, reward: Reward | None, residency: Residency) -> MemoryPlan:
        phases, plan = list(self._phases), self._of.plan
        if reward is not None:
            device = self._bytes.beside_reward(residency) | {"reward": reward.device_bytes}
            phases.insert(self._place, ("reward", device, self._reward_traffic(reward, residency)))
            plan = replace(plan, checkpoint_reward=reward.load.checkpointed, reward_microbatch=reward.rows)
        return replace(plan, reward_residency=residency, phases=tuple(self._cost(*phase) for phase in phases))

    def _all_phases(self) -> Iterator[tuple[str, Mapping[str, int], Total]]:
        """(name, device bytes, traffic) of all phases but the reward's."""
        of, held, moved = self._of, self._bytes, self._moved
        if of.costs.hoisted:
            yield "hoist", held.hoist(), moved.hoist()
        if of.workload.num_inference_steps:
            yield "rollout", held.forward(), moved.rollout()
        for _ in range(of.workload.first_passes):
            params = of.plan.mode == "held"
            both = held.backward(1, params, deliver=False), moved.backward(1, params, deliver=False)
            yield ("first leg" if params else "input gradient", *both)
        if of.legs:
            both = held.backward(of.legs, True, deliver=of.delivers), moved.backward(of.legs, True, deliver=of.delivers)
            yield ("weight gradients", *both)
            if not of.delivers or of.workload.optimizer == "adamw":
                yield "update", held.update(), moved.update()

    def _reward_traffic(self, reward: Reward, residency: Residency) -> Total:
        decisions = (reward, residency, self._bytes.fixed["resident weights"])
        return self._of.once("reward's traffic", decisions, lambda: self._moved.reward(*decisions))

    def _seconds(self, name: str, total: Total) -> float:
        return total.seconds * (1 if name == "update" else self._of.workload.gradient_accumulation_steps)

    def _cost(self, name: str, device: Mapping[str, int], total: Total) -> PhaseCost:
        passes, host = self._of.workload.gradient_accumulation_steps, self._bytes.host
        device = {what: count for what, count in device.items() if count}
        return PhaseCost(
            name,
            device_bytes=sum(device.values()),
            host_bytes=sum(host.values()),
            h2d_bytes=int(total.h2d * passes),
            d2h_bytes=int(total.d2h * passes),
            flops=int(total.flops * passes),
            seconds=self._seconds(name, total),
            breakdown={f"device: {what}": count for what, count in device.items()}
            | {f"host: {what}": count for what, count in host.items()},
        )
