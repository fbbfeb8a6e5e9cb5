"""Exponential moving average of the weights, in float32 whatever the weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """ema = decay * ema + (1 - decay) * w, once an optimizer step.

    float32: at decay 0.995 an update moves the average by 1/200 of the distance to w, which bfloat16 (1/256 of the
    value) would round away. Holds 4 bytes a parameter on the parameters' device, for the whole run.

    Attributes:
        decay: in [0, 1).
        tensors: {name: float32 average}, in the parameters' order.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """Start at the parameters' values.

        Raises:
            ValueError: decay outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must be in [0, 1); the paper uses 0.995, 0 is no average")
        self.decay = decay
        self.tensors = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """One step towards the parameters' values; they are matched by name.

        Computed as ema + (1 - decay) * (w - ema): one kernel, and a weight that stands still stays exactly where it is.
        """
        assert parameters.keys() == self.tensors.keys(), "the average and the parameters have different names"
        weights = [parameters[name].detach().to(torch.float32) for name in self.tensors]  # no copy of float32 ones
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - self.decay)

    @contextmanager
    def swapped(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the float32 parameters hold the average and `tensors` the weights; then all is as before.

        The values change places tensor by tensor, so it costs one parameter's memory and restores every bit.
        """
        self._exchange(parameters)
        try:
            yield
        finally:
            self._exchange(parameters)

    @torch.no_grad()
    def _exchange(self, parameters: Mapping[str, Tensor]) -> None:
        for name, average in self.tensors.items():
            parameter = parameters[name]
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}; only float32 is swapped exactly"
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)
