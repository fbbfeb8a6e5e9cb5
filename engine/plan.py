"""The memory plan: what is where while a streamed model runs. It is decided once, and the runtime obeys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal


@dataclass(frozen=True)
class PhaseCost:
    """What one phase of a step takes, as predicted by engine/planning/costs.py.

    Attributes:
        name: "hoist", "rollout", "reward", "input gradient" or "first leg", "weight gradients", "update".
        device_bytes, host_bytes: the most at once in this phase, with all that is there anyway.
        h2d_bytes, d2h_bytes: copied to and from the device.
        flops: of matrix products, convolutions and attention.
        seconds: of the slowest of arithmetic, copies and host updates, block by block.
        breakdown: {"device: ..." or "host: ...": bytes} of the two peaks.
    """

    name: str
    device_bytes: int
    host_bytes: int
    h2d_bytes: int
    d2h_bytes: int
    flops: int
    seconds: float
    breakdown: Mapping[str, int] = field(default_factory=dict, hash=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"breakdown": dict(self.breakdown)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PhaseCost:
        """What `as_dict` gave.

        Raises:
            ValueError: unknown or missing fields.
        """
        return cls(**_known(values, [each.name for each in fields(cls)], "phase"))


@dataclass(frozen=True)
class MemoryPlan:
    """Decisions that the engine takes from here and from nowhere else. None changes the result by more than rounding.

    `plan_memory` (engine/planning/planner.py) makes one for a budget, with predictions; made by hand it has none.

    Attributes:
        microbatch: rows that one block evaluates at once; None for the whole batch. Activations of a single block of so
            many rows are what the device holds beside weights.
        slots: device slots for streamed weights, each as large as the largest streamed unit. 2 load the next block
            while one computes.
        resident: weights kept on the device. "all" is every weight but those of hoisted modulation, which run once a
            step; a number is that many first blocks, and what is no block; "none" (or 0) streams everything.
        block_inputs: where per-sample tensors (block inputs, cotangents, modulations) wait between the blocks.
        every: keep the input of every n-th block for the backward pass; the others are recomputed from it.
        hoist: evaluate the modulation linears once for all noise levels of a step, apart from the blocks, where the
            backbone has them.
        mode: how nested legs share a step; "paired" runs a leg twice, "held" keeps its weight gradients on the host.
        keep_block_inputs: the rollout keeps the block inputs of the evaluations that will be differentiated.
        optimizer_on: where the update runs.
        reward_residency: "off" takes the resident weights off the device while the reward runs.
        reward_microbatch: pictures that the reward evaluates at once.
        checkpoint_reward: the reward recomputes its decoder's blocks in backward.
        kernels: whether blocks run on the fused kernels, and attention: on which backend; see `backbone_of`.
        phases: predictions, in order; empty if nobody made any.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    microbatch: int | None = 1
    slots: int = 2
    resident: Literal["all", "none"] | int = "none"
    block_inputs: Literal["device", "host"] = "host"
    every: int = 1
    hoist: bool = True
    mode: Literal["paired", "held"] = "paired"
    keep_block_inputs: bool = True
    optimizer_on: Literal["host", "device"] = "host"
    reward_residency: Literal["on", "off"] = "on"
    reward_microbatch: int = 1
    checkpoint_reward: bool = False
    kernels: Literal["auto", "triton", "torch"] = "auto"
    attention: Literal["auto", "native", "cudnn", "flash", "xformers"] = "auto"
    phases: tuple[PhaseCost, ...] = ()

    def __post_init__(self) -> None:
        if self.microbatch is not None and self.microbatch < 1:
            raise ValueError(f"microbatch={self.microbatch} must be at least 1, or None for the whole batch")
        if self.slots < 2:
            raise ValueError(f"slots={self.slots} must be at least 2: one block computes while the next one is loaded")
        number = isinstance(self.resident, int) and not isinstance(self.resident, bool)
        if self.resident not in ("all", "none") and not (number and int(self.resident) >= 0):
            raise ValueError(f"resident={self.resident!r}: choose 'all', 'none' or a number of blocks")
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1: it keeps every n-th block's input")
        for name, choices in (
            ("block_inputs", ("device", "host")),
            ("mode", ("paired", "held")),
            ("optimizer_on", ("host", "device")),
            ("reward_residency", ("on", "off")),
            ("kernels", ("auto", "triton", "torch")),
            ("attention", ("auto", "native", "cudnn", "flash", "xformers")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, choices))}")

    def resident_blocks(self, blocks: int) -> int:
        """How many of a model's blocks, from the first on, stay on the device."""
        if isinstance(self.resident, str):
            return blocks if self.resident == "all" else 0
        return min(self.resident, blocks)

    @property
    def keeps_ends(self) -> bool:
        """Whether condition, stem and head stay on the device too."""
        return self.resident not in ("none", 0)

    @cached_property
    def peak_device_bytes(self) -> int:
        """The most of all phases; 0 without predictions."""
        return max((phase.device_bytes for phase in self.phases), default=0)

    @cached_property
    def peak_host_bytes(self) -> int:
        """The most of all phases; 0 without predictions."""
        return max((phase.host_bytes for phase in self.phases), default=0)

    @cached_property
    def seconds(self) -> float:
        """Of one step, in whole microseconds; 0 without predictions."""
        return round(sum(phase.seconds for phase in self.phases), 6)

    def as_dict(self) -> dict[str, Any]:
        """Decisions and predictions for JSON."""
        decisions = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "phases"}
        return {
            **decisions,
            "peak_device_bytes": self.peak_device_bytes,
            "peak_host_bytes": self.peak_host_bytes,
            "seconds": self.seconds,
            "phases": [phase.as_dict() for phase in self.phases],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryPlan:
        """The plan of which `as_dict` gave these values.

        Raises:
            ValueError: unknown or missing decisions, or a value out of range; the message names it.
        """
        names = [each.name for each in fields(cls)]
        found = _known(values, [*names, "peak_device_bytes", "peak_host_bytes", "seconds"], "plan")
        phases = tuple(PhaseCost.from_dict(phase) for phase in found["phases"])
        return cls(**{name: found[name] for name in names} | {"phases": phases})


def _known(values: Mapping[str, Any], names: Sequence[str], what: str) -> Mapping[str, Any]:
    """The values themselves, if they have exactly these names."""
    if unknown := sorted(values.keys() - set(names)):
        raise ValueError(f"{what} with unknown {', '.join(unknown)}: it has {', '.join(names)}")
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{what} without {', '.join(missing)}: it has {', '.join(names)}")
    return values
