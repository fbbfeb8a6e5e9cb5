"""Alignment gradients: the public entry point. It checks what it is given and hands it to the executor chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leapalign import executors, extensions
from leapalign.engine.backbones.velocity import is_batched
from leapalign.engine.model import StreamedModel
from leapalign.engine.streaming.gradients import Sink
from leapalign.method.surrogates import Method
from leapalign.method.task import Executor, GradientResult, GradientTask, Reward


def alignment_gradients(
    transformer: nn.Module,
    conditioning: Mapping[str, Any],
    noise: Tensor,
    sigmas: Tensor,
    reward: Reward,
    method: Method,
    *,
    pairs: Tensor | None = None,
    generator: torch.Generator | None = None,
    executor: str = "autograd",
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
        method: LeapAlign(alpha, tau, threshold), or another `leapalign.method.surrogates.Method`.
        pairs: (B, n) integer step indices into the rollout, rising in each row and below T; of LeapAlign
            (k_index, j_index). None: drawn as the method draws.
        generator: draws the pairs where `pairs` is None; None for a fresh one seeded 0.
        executor: "autograd" runs the decoupled phases; "reference" one graph through both leaps and the reward, the
            paper's algorithm literally (an oracle for small models). With the streamed ones the weights stay in host
            memory, and so do the gradients returned: "streamed-paired" runs the second leap once more for its input
            gradient, "streamed-held" keeps its weight gradients on the host, in the weights' dtype, and "streamed" does
            what the StreamedModel's plan says, which decides all else in any case. Another one is the entry point of a
            package, or `module:name`.
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
    chosen: Executor = extensions.load("executors", executors.EXECUTORS, executor, key="executor")
    _check_delivery(transformer, executor, chosen, sink, hold)
    noise = noise.detach().to(torch.promote_types(noise.dtype, torch.float32))
    num_steps = _check_inputs(transformer, conditioning, noise, sigmas, executor, chosen, microbatch)
    steps = _resolve_steps(pairs, generator, method, noise.shape[0], num_steps).to(noise.device)
    return chosen(
        GradientTask(
            transformer, conditioning, noise, sigmas, reward, method, steps,
            microbatch=microbatch, scale=scale, sink=sink, hold=hold,
        )
    )  # fmt: skip


def _check_delivery(transformer: nn.Module, executor: str, chosen: Executor, sink: Sink | None, hold: bool) -> None:
    """Refuse a sink or held sums where there is nothing to deliver to or to hold them."""
    if sink is not None and hold:
        raise ValueError("sink and hold=True are both given: hold all passes but the last, and give that one the sink")
    if (sink is not None or hold) and not chosen.delivers:
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
    chosen: Executor,
    microbatch: int | None,
) -> int:
    """Refuse what cannot be meant; returns the number of rollout steps."""
    if isinstance(transformer, StreamedModel) and not chosen.streams:
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


def _resolve_steps(
    pairs: Tensor | None, generator: torch.Generator | None, method: Method, batch: int, num_steps: int
) -> Tensor:
    """(B, n) int64 steps of each sample, drawn by the method or as they are given."""
    if pairs is None:
        return method.draw(batch, num_steps, generator or torch.Generator().manual_seed(0))
    wanted = (batch, method.legs)
    if pairs.shape != wanted or pairs.dtype.is_floating_point or pairs.dtype.is_complex:
        raise ValueError(
            f"pairs is {tuple(pairs.shape)} of {pairs.dtype}: give {wanted} integer step indices, one row a sample"
        )
    steps = pairs.to(torch.int64)
    rising = (steps[:, 1:] > steps[:, :-1]).all(1) & (steps[:, 0] >= 0) & (steps[:, -1] < num_steps)
    wrong = torch.nonzero(~rising).flatten()
    if wrong.numel():
        first = int(wrong[0])
        raise ValueError(
            f"pairs[{first}] = {pairs[first].tolist()} with T = {num_steps} steps: give 0 <= k_index < j_index < T"
        )
    return steps
