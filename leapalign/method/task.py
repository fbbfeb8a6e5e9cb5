"""What an executor is given and what it returns: the gradients of one batch, asked for and found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from leapalign.engine.streaming.gradients import Sink
from leapalign.method.surrogates import Method

Reward = Callable[[Tensor], Tensor]


@runtime_checkable
class SelectableReward(Protocol):
    """A reward that can be restricted to some rows of the batch, and so be evaluated one microbatch at a time."""

    def __call__(self, latents: Tensor, /) -> Tensor: ...

    def select(self, rows: slice, /) -> Reward:
        """The reward of those rows: (rows, ...) latents -> (rows,) rewards, with the rows' own prompts."""
        ...


@dataclass(frozen=True)
class GradientTask:
    """One batch whose gradients are wanted; `leapalign.alignment_gradients` has checked it and explains its fields.

    Attributes:
        noise: (B, ...) float32 or float64.
        sigmas: (T + 1,) falling to 0.
        steps: (B, n) int64 rollout steps that the method differentiates at, rising, on the noise's device.
    """

    transformer: nn.Module
    conditioning: Mapping[str, Any]
    noise: Tensor
    sigmas: Tensor
    reward: Reward
    method: Method
    steps: Tensor
    microbatch: int | None = None
    scale: float = 1.0
    sink: Sink | None = None
    hold: bool = False


@dataclass(frozen=True)
class GradientResult:
    """What `alignment_gradients` returns; nothing in it requires grad.

    Attributes:
        loss: () mean over the batch of weight * max(0, threshold - reward).
        rewards: (B,) at the rollout's x_0.
        weights, d_j, d_0: (B,) similarity weights and leap distances.
        grads: {parameter name: scale * dloss/dparameter of the surrogate} for every parameter that requires grad;
            float32, or float64 for float64 parameters. Empty where they went to a sink or are held.
        pairs: (B, n) int64 the step indices that were used; of LeapAlign (k_index, j_index).
        seconds: {phase: wall-clock seconds}, the device synchronised at the phase's ends.
    """

    loss: Tensor
    rewards: Tensor
    weights: Tensor
    d_j: Tensor
    d_0: Tensor
    grads: dict[str, Tensor]
    pairs: Tensor
    seconds: dict[str, float]


class Executor(Protocol):
    """A way to compute the gradients of a task; one file each in leapalign/executors/.

    Attributes:
        delivers: whether it takes a sink, and holds sums where a StreamedModel holds them.
        streams: whether it takes a StreamedModel; others need all weights in a graph.
    """

    delivers: bool
    streams: bool

    def __call__(self, task: GradientTask, /) -> GradientResult: ...


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: torch.device) -> Iterator[None]:
    """Put the block's wall-clock seconds into `seconds`, the device synchronised at both ends."""
    _synchronize(device)
    start = time.perf_counter()
    yield
    _synchronize(device)
    seconds[phase] = time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
