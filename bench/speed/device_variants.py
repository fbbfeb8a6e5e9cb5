"""The ways of bench/speed/step_variants.py that hold everything on the device: resident, and plain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.speed import random_models, step_variants
from bench.speed.step_variants import LEARNING_RATE, METHOD, Step, Task, Way, grow, pipeline_of
from leapalign.engine.backbones.velocity import evaluation_mode, microbatches, select, velocity
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.costs import predict
from leapalign.engine.planning.planner import Planner
from leapalign.executors.reference import connect, discount, distance, leap, similarity_weights
from leapalign.gradients import alignment_gradients
from leapalign.method.reward_gradient import hinge
from leapalign.method.task import timed
from leapalign.method.trajectory import rollout


class Resident(Way):
    """Weights, gradients, states, VAE and reward on the device; the phases are the engine's."""

    def __init__(self, task: Task) -> None:
        transformer: Any = random_models.transformer(task.sizes, task.device, step_variants.DTYPE)
        transformer.enable_gradient_checkpointing()
        vae = random_models.vae(task.sizes, task.device).to(task.device)
        reward: Any = random_models.reward(task.sizes, task.device)
        for part in (reward, *vars(reward).values()):
            if isinstance(part, nn.Module):
                part.to(task.device)
        self.optimizer, name = eight_bit_adamw(transformer, task.device)
        super().__init__(task, pipeline_of(task, transformer, vae), reward, name, microbatch=task.batch)

    def step(self, number: int, steps: int) -> Step:
        with self._measured():
            found = alignment_gradients(**self._given(number, steps), executor="autograd", microbatch=self.microbatch)
            seconds = dict(found.seconds)
            with timed(seconds, "update", self.task.device):
                for name, parameter in self.pipeline.transformer.named_parameters():
                    parameter.grad = found.grads.pop(name).to(parameter.dtype)
                self._update()
        return Step(seconds, float(found.loss))

    def flops(self, steps: int) -> int:
        forward, reward = arithmetic(self.task)
        # Each of two legs: a forward, and with checkpointing another one and twice as much backward.
        return self.task.batch * ((steps + 2 * 4) * forward + reward)

    def smaller(self) -> bool:
        for parameter in self.pipeline.transformer.parameters():
            parameter.grad = None
        if not self.microbatch or self.microbatch == 1:
            return False
        self.microbatch //= 2
        return True

    def close(self) -> None:
        """Nothing does."""

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """The whole step's peak."""
        gpu = self.task.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.task.device)
        yield
        peak = torch.cuda.max_memory_allocated(self.task.device) if gpu else None
        grow(self.memory, {"step": {"device_bytes": peak, "host_bytes": None}})

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.pipeline.transformer.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Plain(Resident):
    """One graph through both leaps and the reward (as leapalign/executors/reference.py), summed over microbatches."""

    def step(self, number: int, steps: int) -> Step:
        given, losses = self._given(number, steps), []
        seconds: dict[str, float] = {}
        transformer, device, rows_at_once = self.pipeline.transformer, self.task.device, self.microbatch
        with self._measured(), evaluation_mode(transformer):
            with timed(seconds, "rollout", device):
                trajectory = rollout(
                    transformer, given["conditioning"], given["noise"], given["sigmas"], microbatch=rows_at_once
                )
            with timed(seconds, "graph", device):
                for rows in microbatches(self.task.batch, rows_at_once):
                    loss = self._loss(rows, trajectory, given)
                    loss.backward()
                    losses.append(float(loss.detach()))
            with timed(seconds, "update", device):
                self._update()
        return Step(seconds, sum(losses))

    def _loss(self, rows: slice, trajectory: Any, given: Mapping[str, Any]) -> Tensor:
        """Of some rows of the batch, with grad; eqs. 3 to 13."""
        transformer, conditioning = self.pipeline.transformer, select(given["conditioning"], rows)
        k, j = given["pairs"].to(trajectory.sigmas.device).unbind(1)
        s_k, s_j = trajectory.sigmas[k][rows], trajectory.sigmas[j][rows]
        x_k, real_j, real_0 = trajectory.at(k)[rows], trajectory.at(j)[rows], trajectory.final[rows]
        leap_j = leap(x_k, s_k - s_j, velocity(transformer, x_k, s_k, conditioning))
        x_j = connect(leap_j, real_j)
        leap_0 = leap(x_j, s_j, velocity(transformer, discount(x_j, METHOD.alpha), s_j, conditioning))
        d_j, d_0 = distance(real_j, leap_j.detach()), distance(real_0, leap_0.detach())
        weights = similarity_weights(d_j, d_0, METHOD.tau)
        rewards = given["reward"].select(rows)(connect(leap_0, real_0)).to(weights.dtype)
        return hinge(rewards, weights, METHOD.threshold).sum() / self.task.batch


def eight_bit_adamw(transformer: nn.Module, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """bitsandbytes' 8-bit AdamW on a GPU where it is installed, else torch's AdamW; and its name."""
    missing = "which needs a GPU"
    if device.type == "cuda":
        try:
            theirs = their_adamw(device)
        except Exception as error:
            missing = f"which is not to be had: {str(error).strip().partition(chr(10))[0][:80]}"
        else:
            return theirs(transformer.parameters(), lr=LEARNING_RATE), "AdamW8bit of bitsandbytes"
    return torch.optim.AdamW(transformer.parameters(), lr=LEARNING_RATE), f"AdamW of torch for bitsandbytes', {missing}"


def their_adamw(device: torch.device) -> Any:
    """bitsandbytes' class, after a step on the device: without its CUDA library it may fail only then.

    Raises:
        Exception: of any kind; it is not to be had.
    """
    from bitsandbytes.optim import AdamW8bit as TheirAdamW8bit

    weight = nn.Parameter(torch.zeros(2**14, dtype=step_variants.DTYPE, device=device))  # below 4,096 it takes 32 bits
    weight.grad = torch.ones_like(weight)
    TheirAdamW8bit([weight], lr=LEARNING_RATE).step()
    if not weight.any():
        raise RuntimeError("a step changes nothing")
    return TheirAdamW8bit


def arithmetic(task: Task) -> tuple[int, int]:
    """FLOPs of one image: of a transformer's forward, and of the reward with its gradient; counted on meta tensors."""
    workload = task.workload("torch")
    costs = Planner(task.sizes.transformer, workload).costs
    phases = {phase.name: phase.flops for phase in predict(costs, MemoryPlan(), workload).phases}
    evaluations = task.batch * task.steps
    return (phases["hoist"] + phases["rollout"]) // evaluations, phases["reward"] // task.batch
