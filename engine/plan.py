"""The memory plan: what is where while a streamed model runs. It is decided once, and the runtime obeys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MemoryPlan:
    """Decisions that the engine takes from here and from nowhere else. None of them changes the result.

    Attributes:
        microbatch: rows that one block evaluates at once; None for the whole batch. Activations of a single block of so
            many rows are what the device holds beside weights.
        slots: device slots for streamed weights, each as large as the largest streamed unit. 2 load the next block
            while one computes.
        resident: "all" keeps every weight on the device but those of hoisted modulation, which run once a step;
            "none" streams everything.
        block_inputs: where per-sample tensors (block inputs, cotangents, modulations) wait between the blocks.
        every: keep the input of every n-th block for the backward pass; the others are recomputed from it.
        hoist: evaluate the modulation linears once for all noise levels of a step, apart from the blocks, where the
            backbone has them.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    microbatch: int | None = 1
    slots: int = 2
    resident: Literal["all", "none"] = "none"
    block_inputs: Literal["device", "host"] = "host"
    every: int = 1
    hoist: bool = True

    def __post_init__(self) -> None:
        if self.microbatch is not None and self.microbatch < 1:
            raise ValueError(f"microbatch={self.microbatch} must be at least 1, or None for the whole batch")
        if self.slots < 2:
            raise ValueError(f"slots={self.slots} must be at least 2: one block computes while the next one is loaded")
        if self.resident not in ("all", "none"):
            raise ValueError(f"resident={self.resident!r}: choose 'all' or 'none'")
        if self.block_inputs not in ("device", "host"):
            raise ValueError(f"block_inputs={self.block_inputs!r}: choose 'device' or 'host'")
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1: it keeps every n-th block's input")
