"""The reward's phase: rewards, the hinge loss, and its gradient at the rollout's x_0 (LeapAlign, eqs. 11 and 13)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leapalign.engine.backbones.velocity import microbatches
from leapalign.method.task import Reward, SelectableReward

NOT_DIFFERENTIABLE = "reward is not differentiable: compute it from the latents given, without no_grad or detach"


def reward_gradient(
    reward: Reward, latents: Tensor, weights: Tensor, threshold: float, *, microbatch: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, loss and g = dL/dx_0 with L = mean_b w_b max(0, threshold - r_b) (eqs. 11, 13).

    The reward sees `latents` itself, not a sum that equals it up to rounding. g is exactly zero for a sample at or
    above the threshold.

    Args:
        reward: latents -> (B,); called by microbatch if it has `select`.
        latents: (B, ...) x_0.
        weights: (B,) constants.
        threshold: the hinge's lambda, on the reward's scale.
        microbatch: rows a call for a reward with `select`.

    Returns:
        (B,) rewards and () loss in the weights' dtype, (B, ...) g in the latents' dtype.
    """
    batch = latents.shape[0]
    rewards, g = torch.empty_like(weights), torch.empty_like(latents)
    select_rows = reward.select if isinstance(reward, SelectableReward) else None
    for rows in microbatches(batch, microbatch if select_rows else None):
        scorer = select_rows(rows) if select_rows else reward
        with torch.enable_grad():
            x = latents[rows].detach().requires_grad_()
            r = score(scorer, x).to(weights)  # from where the reward runs
            loss = hinge(r, weights[rows], threshold).sum() / batch
        rewards[rows] = r.detach()
        check_finite(r.detach(), "reward", range(batch)[rows])
        (dx,) = torch.autograd.grad(loss, x, allow_unused=True)
        if dx is None:
            raise ValueError(NOT_DIFFERENTIABLE)
        check_finite(dx, "reward gradient", range(batch)[rows])
        g[rows] = dx
    return rewards, hinge(rewards, weights, threshold).sum() / batch, g


def hinge(rewards: Tensor, weights: Tensor, threshold: float) -> Tensor:
    """(B,) w max(0, threshold - r); relu because its derivative is 0 at r = threshold, where clamp's is 1."""
    return weights * torch.relu(threshold - rewards)


def score(reward: Reward, latents: Tensor) -> Tensor:
    """Call the reward and hold it to its contract: (B, ...) -> (B,), differentiable."""
    rewards = reward(latents)
    if rewards.shape != latents.shape[:1]:
        raise ValueError(
            f"reward returned shape {tuple(rewards.shape)} for {latents.shape[0]} samples: return one number a sample"
        )
    if not rewards.requires_grad:
        raise ValueError(NOT_DIFFERENTIABLE)
    return rewards


def check_finite(values: Tensor, what: str, samples: Sequence[int]) -> None:
    """FloatingPointError naming the samples whose row of `values` (len(samples), ...) is not finite."""
    wrong = torch.nonzero(~torch.isfinite(values).reshape(values.shape[0], -1).all(1)).flatten()
    if wrong.numel():
        raise FloatingPointError(f"{what} is not finite for samples {[samples[int(i)] for i in wrong]}")
