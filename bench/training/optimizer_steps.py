"""Ways to make an AdamW step on the parameters of a model with float32 gradients, for benchmarks that compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.kernels.adamw8bit import host as host_adamw8bit
from leapalign.kernels.adamw8bit.definition import Hyper, adamw
from leapalign.kernels.adamw8bit.quantize import BLOCK


@dataclass(frozen=True)
class Settings:
    """AdamW's, and the seed of stochastic rounding."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    seed: int = 0

    def hyper(self, step: int) -> Hyper:
        """With the step's number, from 1."""
        return Hyper(self.lr, self.beta1, self.beta2, self.eps, self.weight_decay, step)


Parameters = Mapping[str, Tensor]  # float32, changed in place
Step = Callable[[Mapping[str, Tensor], int], None]  # gradients by name, the step's number


def float32(parameters: Parameters, settings: Settings) -> Step:
    """float32 moments and weights."""
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}

    @torch.no_grad()
    def step(gradients: Mapping[str, Tensor], number: int) -> None:
        for name, parameter in parameters.items():
            w, m, v = adamw(parameter, gradients[name], *moments[name], settings.hyper(number))
            parameter.copy_(w)
            moments[name] = m, v

    return step


def nearest(parameters: Parameters, settings: Settings) -> Step:
    """float32 moments, bfloat16 weights rounded to nearest."""
    exact = float32(parameters, settings)

    @torch.no_grad()
    def step(gradients: Mapping[str, Tensor], number: int) -> None:
        exact(gradients, number)
        for parameter in parameters.values():
            parameter.copy_(parameter.bfloat16())

    return step


def eight_bit(parameters: Parameters, settings: Settings) -> Step:
    """8-bit moments, bfloat16 weights rounded stochastically, on the host."""
    return _eight_bit(parameters, settings, torch.bfloat16)


def eight_bit_float32(parameters: Parameters, settings: Settings) -> Step:
    """8-bit moments, float32 weights, on the host."""
    return _eight_bit(parameters, settings, torch.float32)


def _eight_bit(parameters: Parameters, settings: Settings, dtype: torch.dtype) -> Step:
    states = {}
    for name, parameter in parameters.items():
        blocks = -(-parameter.numel() // BLOCK)
        codes = [torch.zeros(parameter.numel(), dtype=torch.uint8) for _ in range(2)]
        states[name] = (codes[0], torch.zeros(blocks), codes[1], torch.zeros(blocks))

    @torch.no_grad()
    def step(gradients: Mapping[str, Tensor], number: int) -> None:
        hyper, seed = settings.hyper(number), settings.seed
        stored = {name: parameter.detach().to(dtype).view(-1) for name, parameter in parameters.items()}
        handles = [
            host_adamw8bit.update(
                weights, gradients[name].reshape(-1), *states[name], hyper, seed=seed, parameter=index, guard=0.0
            )
            for index, (name, weights) in enumerate(stored.items())
        ]
        for handle, (name, weights) in zip(handles, stored.items(), strict=True):
            handle.wait()
            parameters[name].copy_(weights.view(parameters[name].shape))

    return step


def bitsandbytes(parameters: Parameters, settings: Settings) -> Step:
    """bitsandbytes' AdamW8bit on float32 weights.

    Raises:
        ImportError: it is not installed.
    """
    from bitsandbytes.optim import AdamW8bit

    betas = settings.beta1, settings.beta2
    given = list(parameters.values())
    optimizer = AdamW8bit(given, lr=settings.lr, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay)

    def step(gradients: Mapping[str, Tensor], number: int) -> None:
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        optimizer.step()

    return step
