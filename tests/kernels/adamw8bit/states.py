"""States of 8-bit AdamW made by steps of it, and read back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from leapalign.kernels.adamw8bit.definition import Hyper, update
from leapalign.kernels.adamw8bit.quantize import blocks_of, dequantize, signed_map, unsigned_map

HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=1)


def randn(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


Moments = tuple[Tensor, Tensor, Tensor, Tensor]  # codes_m, absmax_m, codes_v, absmax_v


def state(count: int) -> Moments:
    """Before the first step."""
    codes, absmax = torch.zeros(count, dtype=torch.uint8), torch.zeros(blocks_of(count))
    return codes, absmax, codes.clone(), absmax.clone()


def used_state(count: int, seed: int) -> Moments:
    """The state after some steps with gradients of several sizes."""
    moments = state(count)
    for step in range(1, 4):
        gradient = randn(count, seed + step) * randn(count, seed).mul(2).exp()
        update(torch.zeros(count), gradient, *moments, dataclasses.replace(HYPER, step=step), seed=0, parameter=0)
    return moments


def moments_of(moments: Moments) -> tuple[Tensor, Tensor]:
    """(m, √v) that a state stands for."""
    codes_m, absmax_m, codes_v, absmax_v = moments
    return dequantize(codes_m, absmax_m, map=signed_map()), dequantize(codes_v, absmax_v, map=unsigned_map())
