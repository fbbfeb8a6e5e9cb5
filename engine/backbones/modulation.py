"""Hoisted adaLN modulation: norms that take ready vectors, and the gradient of their linears as factors.

An adaLN linear sees only silu(temb), (B, D): time, guidance and pooled text, never a token. So its output
m = silu(temb) W^T + b, (B, width), can be computed for every sample and noise level of a step at once, and the gradient
of W is a sum of as few outer products as there are such rows: dW = dm^T silu(temb).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.kernels.sum_of_squares import sum_of_squares_outer


@dataclass(frozen=True)
class OuterProduct:
    """The gradient left^T right of a linear's weight (out, in), a sum of R outer products, not multiplied out.

    Attributes:
        left: (R, out) gradients of the linear's output.
        right: (R, in) the linear's inputs, on the same device.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        assert self.left.ndim == 2 and self.right.ndim == 2, "factors are matrices"
        assert self.left.shape[0] == self.right.shape[0], "factors have one row for each outer product"

    @property
    def shape(self) -> torch.Size:
        """(out, in)"""
        return torch.Size((self.left.shape[1], self.right.shape[1]))

    def tiles(self, max_elements: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, Tensor]]:
        """(rows, left[:, rows]^T right) over consecutive rows of the output, which cover it once.

        Args:
            max_elements: of a tile (rows, in), at least `in`.
            dtype: of the factors when they are multiplied, and of the tiles.
        """
        out, columns = self.shape
        if max_elements < columns:
            raise ValueError(f"max_elements={max_elements} holds no row of the gradient: give at least {columns}")
        right = self.right.to(dtype)
        step = max_elements // max(columns, 1)
        for start in range(0, out, max(step, 1)):
            rows = slice(start, min(start + step, out))
            yield rows, self.left[:, rows].to(dtype).T @ right

    def expand(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) the whole product."""
        return self.left.to(dtype).T @ self.right.to(dtype)

    def square_sum(self) -> Tensor:
        """() float64 |left^T right|_F^2, see `sum_of_squares_outer`: not finite where the product may overflow.

        Reads R (out + in) numbers instead of making out x in of them. Never negative: rounding may leave the sum of
        factors that cancel below zero.
        """
        return sum_of_squares_outer(self.left, self.right).clamp(min=0)


class _GivenModulation(nn.Module):
    """A norm whose vectors are columns of a tensor given to it in place of temb."""

    def __init__(self, norm: nn.Module, start: int, width: int, chunks: int) -> None:
        super().__init__()
        self.norm, self.columns, self.chunks = norm, slice(start, start + width), chunks

    def vectors(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, D) each, in the order of the linear's rows."""
        return condition[:, self.columns].chunk(self.chunks, dim=1)


class GivenZero(_GivenModulation):
    """AdaLayerNormZero (shift, scale, gate, shift, scale, gate) and AdaLayerNormZeroSingle (shift, scale, gate).

    (B, tokens, D), condition -> (the norm's output (B, tokens, D), what follows its shift and scale, (B, D) each).
    """

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        shift, scale, *rest = self.vectors(emb)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], *rest


class GivenZeroX(_GivenModulation):
    """SD35AdaLayerNormZeroX: nine vectors; the last three are shift, scale and gate of the second attention."""

    def forward(self, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.vectors(emb)
        normed = self.norm(hidden_states)
        first = normed * (1 + scale[:, None]) + shift[:, None]
        second = normed * (1 + scale2[:, None]) + shift2[:, None]
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


class GivenContinuous(_GivenModulation):
    """AdaLayerNormContinuous: scale first, then shift."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.vectors(conditioning_embedding)
        result: Tensor = self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]
        return result


# diffusers' class -> its replacement and the number of vectors. By name: importing diffusers here would cost seconds.
_GIVEN: dict[str, tuple[type[_GivenModulation], int]] = {
    "AdaLayerNormZero": (GivenZero, 6),
    "AdaLayerNormZeroSingle": (GivenZero, 3),
    "SD35AdaLayerNormZeroX": (GivenZeroX, 9),
    "AdaLayerNormContinuous": (GivenContinuous, 2),
}


def modulation_vectors(norm: Any, condition: Tensor) -> tuple[Tensor, ...]:
    """(B, D) each: the vectors of an adaLN norm, hoisted or not, in the order of its linear's rows.

    Args:
        norm: of a class that can be hoisted, or its replacement.
        condition: (B, width) for a replacement, else (B, D) temb.
    """
    if isinstance(norm, _GivenModulation):
        return norm.vectors(condition)
    return norm.linear(norm.silu(condition)).chunk(_GIVEN[type(norm).__name__][1], dim=1)


def hoist_modulation(block: nn.Module, norms: Sequence[str]) -> tuple[str, ...]:
    """Replace these adaLN norms of a template block by ones that take their columns of a given `condition`.

    Args:
        block: a template of diffusers' block, modified in place.
        norms: attribute names, in the order in which their vectors stand in `condition` (B, sum of widths).

    Returns:
        Names of their linears inside the block, in the same order.

    Raises:
        ValueError: a norm is of another class, or its linear is not a plain `nn.Linear` (an adapter on it).
    """
    linears, start = [], 0
    for name in norms:
        norm: Any = getattr(block, name)
        kind = type(norm).__name__
        if kind not in _GIVEN or type(norm.linear) is not nn.Linear or getattr(norm, "emb", None) is not None:
            raise ValueError(
                f"{name} of {type(block).__name__} is a {kind} that cannot be hoisted (known: {', '.join(_GIVEN)}, "
                "with a plain linear): pass hoist=False"
            )
        replacement, chunks = _GIVEN[kind]
        width = norm.linear.out_features
        setattr(block, name, replacement(norm.norm, start, width, chunks))
        linears.append(f"{name}.linear")
        start += width
    return tuple(linears)
