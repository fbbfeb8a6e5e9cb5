"""LeapAlign's surrogate as autograd nodes: the latents of the rollout, with the gradients of the leaps.

For a trainer that calls `backward()` itself. A connector has the value of the rollout's latents, bit for bit, and the
gradient of the one-step prediction; the discount has its input's value and alpha times its gradient (LeapAlign, arXiv
2604.15311, eqs. 5, 7 and 9; sg is the stop-gradient):

    x_j = x^_{j|k} + sg(x_j - x^_{j|k})         x^_{j|k} = x_k - (k - j) v_k
    discount(x_j) = alpha x_j + (1 - alpha) sg(x_j)

Algorithm 1 with them, m the model and r the reward:

    x_j, model_input, d_j = leap_connector(x_k, m(x_k, k), rollout_j, k, j, alpha)
    x_0, _, d_0 = leap_connector(x_j, m(model_input, j), rollout_0, j, torch.zeros_like(j))
    loss = (similarity_weights(d_j, d_0, tau) * relu(threshold - r(x_0))).mean()

Values cost nothing: they are views of the rollout's latents. Forward is one pass over x_k, v_k and x_j for the distance
(12 bytes an element in float32); backward is the one pass of `leapalign.kernels.leap.cotangents`, -(k - j)(g + alpha u)
from the gradients that arrive at x_j and at the model's input (12 bytes; discount, sum and product one by one: 28). For
the backward pass only k and j are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leapalign.kernels.leap.cotangents import cotangent_and_carry, cotangent_k
from leapalign.kernels.leap.prediction import leap_distance


class Connected(NamedTuple):
    """What `leap_connector` returns.

    Attributes:
        latents: (B, ...) the rollout's x_j with the gradient of x^_{j|k}: it is carried to the next leap.
        model_input: the same with that gradient times alpha: it is what the next model evaluation takes.
        distance: (B,) d_j = mean |x_j - x^_{j|k}|, a constant.
    """

    latents: Tensor
    model_input: Tensor
    distance: Tensor


def leap_connector(x_k: Tensor, v_k: Tensor, x_j: Tensor, k: Tensor, j: Tensor, alpha: float = 1.0) -> Connected:
    """One leap k -> j and its connector, and the discount on what the model sees next.

    Args:
        x_k: (B, ...) latents at k, of the rollout or of a connector before.
        v_k: (B, ...) velocities there.
        x_j: (B, ...) the rollout's latents at j, a value, of which the results are views.
        k, j: (B,) noise levels of each sample, k > j; constants. j = 0 for the last leap.
        alpha: the discount of the gradient through `model_input`.

    Raises:
        ValueError: tensors of different shapes, or without a batch dimension or elements.
    """
    return Connected(*_Connector.apply(x_k, v_k, x_j.detach(), k.detach(), j.detach(), alpha))


def discount(x: Tensor, alpha: float) -> Tensor:
    """alpha x + (1 - alpha) sg(x): the value of x and alpha times its gradient (eq. 9)."""
    found: Tensor = _Discount.apply(x, alpha)
    return found


class _Connector(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_k: Tensor, v_k: Tensor, x_j: Tensor, k: Tensor, j: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        distance = leap_distance(x_k, v_k, x_j, k, j)
        ctx.save_for_backward(k, j)
        ctx.alpha, ctx.dtypes = alpha, (x_k.dtype, v_k.dtype)
        ctx.mark_non_differentiable(distance)
        ctx.set_materialize_grads(False)  # no gradient at the model's input: y = g, and g itself goes on
        return x_j.view_as(x_j), x_j.view_as(x_j), distance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, u, _ = grads
        k, j = ctx.saved_tensors
        if g is None and u is None:
            return None, None, None, None, None, None
        if g is None:
            assert u is not None
            g = torch.zeros_like(u)
        y, c_k = g, None
        if u is not None and ctx.needs_input_grad[0]:
            c_k, y = cotangent_and_carry(g, u, ctx.alpha, k, j, dtype=ctx.dtypes[1])
        elif ctx.needs_input_grad[1]:
            c_k = cotangent_k(g, u, ctx.alpha, k, j, dtype=ctx.dtypes[1])
        return y.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None, c_k, None, None, None, None


class _Discount(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.alpha * grads[0], None
