"""Inputs, plans and expected products that tests of the model share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.plan import MemoryPlan

SIGMAS = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)


PLANS = {
    "streamed": MemoryPlan(),
    "unhoisted": MemoryPlan(hoist=False),
    "whole batch, 3 slots": MemoryPlan(microbatch=None, slots=3),
    "every 2nd on the device": MemoryPlan(microbatch=2, block_inputs="device", every=2),
    "resident": MemoryPlan(microbatch=2, resident="all"),
    "every 3rd, unhoisted": MemoryPlan(every=3, hoist=False, slots=3),
}


def model_inputs(family: str, make_inputs: Any, batch: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    latents, conditioning = make_inputs(family, batch, dtype)
    timestep = SIGMAS[:batch].to(dtype) * (1000 if family == "sd3" else 1)
    return {"hidden_states": latents, "timestep": timestep, **conditioning}


def expected_products(
    transformer: nn.Module, inputs: dict[str, Any], cotangent: Tensor, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({parameter: gradient}, {input: gradient}) by one plain autograd graph."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    output = transformer(**{**inputs, **leaves}, return_dict=False)[0]
    weights = dict(transformer.named_parameters())
    found = torch.autograd.grad(output, [*weights.values(), *leaves.values()], cotangent, allow_unused=True)
    every = [
        torch.zeros_like(target) if gradient is None else gradient
        for target, gradient in zip([*weights.values(), *leaves.values()], found, strict=True)
    ]
    return dict(zip(weights, every, strict=False)), dict(zip(names, every[len(weights) :], strict=True))
