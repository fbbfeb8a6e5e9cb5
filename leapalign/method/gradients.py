"""Alignment gradients: the public entry point, and the decoupled executor behind it.

Rollout, reward gradient and vector-Jacobian products run one after another and share nothing but values, because the
reward gradient depends only on the value of x_0 and the weights only on cached values. So no graph spans two phases or
two legs, and peak memory is the largest phase's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.velocity import evaluation_mode, is_batched, microbatches, select
from leapalign.engine.model import StreamedModel
from leapalign.engine.passes.vjp import ensure_grads, trainable, velocity_vjp
from leapalign.engine.streaming.gradients import Sink
from leapalign.kernels.leap.cotangents import leg_cotangent
from leapalign.method.draws import random_pairs
from leapalign.method.surrogates import LeapAlign, Surrogate, leapalign2
from leapalign.method.trajectory import Trajectory, rollout

Reward = Callable[[Tensor], Tensor]
Executor = Literal["autograd", "reference", "streamed", "streamed-paired", "streamed-held"]
MODES: dict[str, Literal["paired", "held"] | None] = {
    "streamed": None, "streamed-paired": "paired", "streamed-held": "held"
}  # fmt: skip

NOT_DIFFERENTIABLE = "reward is not differentiable: compute it from the latents given, without no_grad or detach"


@runtime_checkable
class SelectableReward(Protocol):
    """A reward that can be restricted to some rows of the batch, and so be evaluated one microbatch at a time."""

    def __call__(self, latents: Tensor, /) -> Tensor: ...

    def select(self, rows: slice, /) -> Reward:
        """The reward of those rows: (rows, ...) latents -> (rows,) rewards, with the rows' own prompts."""
        ...


@dataclass(frozen=True)
class GradientResult:
    """What `alignment_gradients` returns; nothing in it requires grad.

    Attributes:
        loss: () mean over the batch of weight * max(0, threshold - reward).
        rewards: (B,) at the rollout's x_0.
        weights, d_j, d_0: (B,) similarity weights and leap distances.
        grads: {parameter name: scale * dloss/dparameter of the surrogate} for every parameter that requires grad;
            float32, or float64 for float64 parameters. Empty where they went to a sink or are held.
        pairs: (B, 2) int64 the step indices (k_index, j_index) that were used.
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


def alignment_gradients(
    transformer: nn.Module,
    conditioning: Mapping[str, Any],
    noise: Tensor,
    sigmas: Tensor,
    reward: Reward,
    method: LeapAlign,
    *,
    pairs: Tensor | None = None,
    generator: torch.Generator | None = None,
    executor: Executor = "autograd",
    microbatch: int | None = None,
    scale: float = 1.0,
    sink: Sink | None = None,
    hold: bool = False,
) -> GradientResult:
    """Gradient of the LeapAlign loss for all trainable parameters, one batch (arXiv 2604.15311, Algorithm 1).

    Nothing is stepped. The transformer runs without dropout, and its `training` flags, `requires_grad` and `.grad` are
    left as they were. Gradient checkpointing is its own setting (`transformer.enable_gradient_checkpointing()`).

    Args:
        transformer: a FluxTransformer2DModel, an SD3Transformer2DModel, or a module of the same call signature that
            names its `timestep_scale`. For the streamed executors a StreamedModel, whose plan says what is where; a
            FLUX or SD3 transformer on the CPU is made one for this call, which copies its weights.
        conditioning: the transformer's own keyword arguments (encoder_hidden_states, pooled_projections, guidance,
            txt_ids, img_ids): batched tensors have B rows; the two position ids have no batch dimension.
        noise: (B, ...) latents at sigmas[0]. Latents are kept in this dtype, and in float32 at least.
        sigmas: (T + 1,) noise levels falling from 1 to 0, T >= 2 Euler steps.
        reward: differentiable, (B, ...) latents x_0 -> (B,). It is called once with the whole batch; one with a method
            `select(rows: slice)` is called microbatch by microbatch. A streamed executor gives it latents where the
            noise is, and enters the context manager of its method `visit()`, if it has one, for its phase.
        method: LeapAlign(alpha, tau, threshold).
        pairs: (B, 2) integer step indices into the rollout, k_index < j_index < T. None: drawn uniformly.
        generator: draws the pairs where `pairs` is None; None for a fresh one seeded 0.
        executor: "autograd" runs the decoupled phases; "reference" one graph through both leaps and the reward, the
            paper's algorithm literally (an oracle for small models). With the streamed ones the weights stay in host
            memory, and so do the gradients returned: "streamed-paired" runs the second leap once more for its input
            gradient, "streamed-held" keeps its weight gradients on the host, in the weights' dtype, and "streamed" does
            what the StreamedModel's plan says, which decides all else in any case.
        microbatch: samples in one transformer call (decoupled executor: and in one graph); None for the whole batch.
            A StreamedModel splits the batch as its own plan says: there this is for the reward alone, and None the
            plan's.
        scale: factor on all gradients (1 / passes where passes are accumulated); `loss` is reported without it.
        sink: streamed executors: takes every finished gradient, sums that were held included, in the last product,
            instead of the result. Once every unit, zeros if no sample is active.
        hold: streamed executors with a StreamedModel: add the gradients to the sums that the model holds on the host,
            in the weights' dtype. A later call with a sink delivers them, or the caller takes them
            (`model.sums.take("held")`, `AdamW8bit.step_from("held")`). Errors in the reward or a product discard them.

    Raises:
        ValueError: an argument of the wrong shape, range or kind, or a reward that is not differentiable.
        FloatingPointError: a reward or its gradient is not finite, or with a streamed executor a leg's cotangent; the
            message names the samples, and nothing has been delivered.
    """
    _check_delivery(transformer, executor, sink, hold)
    noise = noise.detach().to(torch.promote_types(noise.dtype, torch.float32))
    num_steps = _check_inputs(transformer, conditioning, noise, sigmas, executor, microbatch)
    pairs = _resolve_pairs(pairs, generator, noise.shape[0], num_steps).to(noise.device)
    if executor in MODES:
        from leapalign.executors.streamed import streamed_gradients  # it needs this module's result type

        return streamed_gradients(
            transformer,
            conditioning,
            noise,
            sigmas,
            reward,
            method,
            pairs,
            mode=MODES[executor],
            microbatch=microbatch,
            scale=scale,
            sink=sink,
            hold=hold,
        )
    seconds: dict[str, float] = {}
    with evaluation_mode(transformer):
        with timed(seconds, "rollout", noise.device):
            trajectory = rollout(transformer, conditioning, noise, sigmas, keep=pairs, microbatch=microbatch)
        if executor == "reference":
            from leapalign.executors.reference import reference_gradients  # it needs this module's result type

            with timed(seconds, "graph", noise.device):
                found = reference_gradients(transformer, conditioning, trajectory, reward, method, pairs, seconds)
            return replace(found, grads={name: gradient * scale for name, gradient in found.grads.items()})
        surrogate = leapalign2(trajectory, pairs, method)
        with timed(seconds, "reward", noise.device):
            rewards, loss, g = reward_gradient(
                reward, trajectory.final, surrogate.weights, method.threshold, microbatch=microbatch
            )
        with timed(seconds, "vjp", noise.device):
            grads = surrogate_gradients(
                transformer, conditioning, trajectory, surrogate, g * scale, microbatch=microbatch
            )
    return GradientResult(
        loss, rewards, surrogate.weights, surrogate.d_j, surrogate.d_0, grads, pairs=pairs, seconds=seconds
    )


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


def surrogate_gradients(
    transformer: nn.Module,
    conditioning: Mapping[str, Any],
    trajectory: Trajectory,
    surrogate: Surrogate,
    g: Tensor,
    *,
    microbatch: int | None = None,
) -> dict[str, Tensor]:
    """Run the surrogate's legs from g = dL/dx_0 and return {parameter name: gradient} (eq. 10).

    Samples whose g is exactly zero (hinge inactive) add nothing and are left out of every product. One graph of
    `microbatch` samples and one leg lives at a time.
    """
    grads: dict[str, Tensor] = {}
    ensure_grads(grads, trainable(transformer))
    active = torch.nonzero(g.flatten(1).any(1)).flatten()
    if not grads or active.numel() == 0:
        return grads
    given = select(conditioning, active)
    y, u = g[active], None
    for index, leg in enumerate(surrogate.legs):
        cotangent, y = leg_cotangent(y, u, surrogate.discount, leg.coefficient[active])
        passes_on = index + 1 < len(surrogate.legs) and surrogate.discount != 0
        u = velocity_vjp(
            transformer,
            trajectory.at(leg.step)[active],
            trajectory.sigmas[leg.step][active],
            given,
            cotangent,
            grads=grads,
            input_grad=passes_on,
            microbatch=microbatch,
        )
    return grads


def _check_delivery(transformer: nn.Module, executor: str, sink: Sink | None, hold: bool) -> None:
    """Refuse a sink or held sums where there is nothing to deliver to or to hold them."""
    if sink is not None and hold:
        raise ValueError("sink and hold=True are both given: hold all passes but the last, and give that one the sink")
    if (sink is not None or hold) and executor not in MODES:
        name = "hold=True" if hold else "sink"
        raise ValueError(f"executor={executor!r} takes no {name}: use streamed-paired or streamed-held")
    if hold and not isinstance(transformer, StreamedModel):
        raise ValueError(
            f"hold=True with a {type(transformer).__name__}: the sums live in a StreamedModel; make one of it first"
        )


def _check_inputs(
    transformer: nn.Module,
    conditioning: Mapping[str, Any],
    noise: Tensor,
    sigmas: Tensor,
    executor: str,
    microbatch: int | None,
) -> int:
    """Refuse what cannot be meant; returns the number of rollout steps."""
    if executor not in get_args(Executor):
        raise ValueError(f"executor={executor!r}: choose one of {', '.join(get_args(Executor))}")
    if isinstance(transformer, StreamedModel) and executor not in MODES:
        raise ValueError(
            f"executor={executor!r} needs all weights in a graph: give a StreamedModel the executor streamed"
        )
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch={microbatch} must be at least 1, or None for the whole batch")
    if noise.ndim < 2 or noise.shape[0] < 1:
        raise ValueError(f"noise has shape {tuple(noise.shape)}: give (B, ...) latents with B >= 1")
    if sigmas.ndim != 1 or sigmas.shape[0] < 3:
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}: give (T + 1,) noise levels of T >= 2 rollout steps")
    falling = bool((sigmas[1:] < sigmas[:-1]).all())  # false for NaN as well
    if not falling or sigmas[0] > 1 or sigmas[-1] != 0:
        raise ValueError(
            f"sigmas goes from {sigmas[0]:.4g} to {sigmas[-1]:.4g}: give levels that fall strictly from at most 1 to 0"
        )
    for name, value in conditioning.items():
        if is_batched(name, value) and value.shape[0] != noise.shape[0]:
            raise ValueError(
                f"conditioning {name!r} has {value.shape[0]} rows and noise has {noise.shape[0]}: give one row a sample"
            )
    return sigmas.shape[0] - 1


def _resolve_pairs(pairs: Tensor | None, generator: torch.Generator | None, batch: int, num_steps: int) -> Tensor:
    if pairs is None:
        return random_pairs(batch, num_steps, generator or torch.Generator().manual_seed(0))
    if pairs.shape != (batch, 2) or pairs.dtype.is_floating_point or pairs.dtype.is_complex:
        raise ValueError(
            f"pairs is {tuple(pairs.shape)} of {pairs.dtype}: give ({batch}, 2) integer step indices, one pair a sample"
        )
    k, j = pairs.to(torch.int64).unbind(1)
    wrong = torch.nonzero((k < 0) | (k >= j) | (j >= num_steps)).flatten()
    if wrong.numel():
        first = int(wrong[0])
        raise ValueError(
            f"pairs[{first}] = {pairs[first].tolist()} with T = {num_steps} steps: give 0 <= k_index < j_index < T"
        )
    return pairs.to(torch.int64)


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
