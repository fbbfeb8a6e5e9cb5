"""The order in which squares are added up, in torch: what every kernel of it equals bit for bit.

Of a chunk of 4,096 elements, lane l of 16 adds elements l, l + 16, ... in turn; lanes, and then chunks, are added in
pairs of neighbours, as if zeros followed the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16
TURNS = 256  # elements that a lane adds
CHUNK = LANES * TURNS
SLAB = 1 << 20  # elements that are widened at a time: 8 MiB


@torch.no_grad()
def sum_of_squares_reference(x: Tensor) -> Tensor:
    """() float64: the sum of the squares of x, any shape, contiguous, float32 or bfloat16, on any device."""
    partial = []
    for slab in x.detach().view(-1).split(SLAB):
        chunk = torch.nn.functional.pad(slab.double().square_(), (0, -slab.numel() % CHUNK)).view(-1, TURNS, LANES)
        lanes = torch.zeros_like(chunk[:, 0])
        for turn in chunk[:, : -(-slab.numel() // LANES)].unbind(1):  # torch.sum promises no order
            lanes += turn
        partial.append(_pairs(lanes))
    return _pairs(torch.cat([*partial, torch.zeros(1, dtype=torch.float64, device=x.device)]))


def _pairs(values: Tensor) -> Tensor:
    """Add the last dimension in pairs of neighbours: (..., n) -> (...)."""
    while values.shape[-1] > 1:
        values = torch.nn.functional.pad(values, (0, values.shape[-1] % 2)).unflatten(-1, (-1, 2))
        values = values[..., 0] + values[..., 1]
    return values[..., 0]
