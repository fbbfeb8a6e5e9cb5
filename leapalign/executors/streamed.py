"""The streamed executor: the same decoupled phases, with a transformer whose weights live in host memory.

Rollout and vector-Jacobian products run layer-major over the whole batch (leapalign.engine.model). Weights are used
twice in one LeapAlign step, at x_k and at x_j, and the cotangent at x_k needs the input gradient at x_j first. So
either that input gradient is found in a pass of its own, and one more pass runs both legs together ("paired"), or the
first leg's weight gradients wait on the host for those of the second ("held").

The rollout can keep the block inputs of the evaluations that will be differentiated: the steps are drawn before it.

The phases are separate functions. Nothing in `streamed_rollout` and `streamed_vjps` depends on a tensor's values, so
that both also run on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.velocity import is_batched, select, timestep_scale
from leapalign.engine.model import StreamedModel
from leapalign.engine.passes.evaluation import Leg, ModulationRows, Modulations, Record
from leapalign.engine.passes.vjp import trainable
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.gradients import GradientDictionary, Sink
from leapalign.kernels.leap.cotangents import leg_cotangent
from leapalign.method.reward_gradient import check_finite, reward_gradient
from leapalign.method.surrogates import Surrogate
from leapalign.method.task import GradientResult, GradientTask, timed
from leapalign.method.trajectory import Trajectory, euler

Mode = Literal["paired", "held"]
Steps = Sequence[Sequence[int]]  # B times n rollout steps, each sample's in rising order


@runtime_checkable
class VisitingReward(Protocol):
    """A reward whose models come to the device for its phase only."""

    def visit(self) -> AbstractContextManager[None]:
        """Inside the block they are there."""
        ...


@dataclass(frozen=True)
class StreamedRollout:
    """A trajectory, and what the vector-Jacobian products at its steps can reuse.

    Attributes:
        trajectory: with the velocities at `steps`.
        steps: the steps to be differentiated at, by sample.
        modulations: hoisted; row i B + b is sample b at step i. None where the model hoists nothing.
        record: block inputs; row n B + b is sample b at steps[b][n]. None: to be recomputed.
    """

    trajectory: Trajectory
    steps: Steps
    modulations: Modulations | None
    record: Record | None

    def drop(self) -> None:
        """Give back the memory of all but the trajectory."""
        for part in (self.modulations, self.record):
            if part is not None:
                part.drop()


@dataclass(frozen=True)
class Streamed:
    """Gradients with the weights in host memory; returned there, 4 bytes a parameter (8 for float64), or delivered.

    Attributes:
        mode: None: the model's plan's, as is all else.
    """

    mode: Mode | None = None
    delivers: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __call__(self, task: GradientTask, /) -> GradientResult:
        """See `leapalign.alignment_gradients`; the task's microbatch is the reward's, None the plan's."""
        return _gradients(task, self.mode)


by_plan, paired, held = Streamed(), Streamed("paired"), Streamed("held")


def _gradients(task: GradientTask, mode: Mode | None) -> GradientResult:
    """Rollout, reward and products in turn; the held sums are discarded if one of them fails."""
    seconds: dict[str, float] = {}
    own = GradientDictionary() if task.sink is None and not task.hold else None
    goal = own if own is not None else task.sink
    with streamed_model(
        task.transformer, task.microbatch, reward_microbatch=task.microbatch or task.noise.shape[0]
    ) as model:
        parameters, plan = trainable(model), model.plan
        visit = task.reward.visit if isinstance(task.reward, VisitingReward) else nullcontext
        keep = plan.keep_block_inputs and bool(parameters)
        with timed(seconds, "rollout", model.device):
            rolled = streamed_rollout(
                model, task.conditioning, task.noise, task.sigmas, task.steps.tolist(), keep_block_inputs=keep
            )
        try:
            trajectory = rolled.trajectory
            surrogate = task.method.surrogate(trajectory, task.steps)
            with timed(seconds, "reward", model.device), reward_phase(model, visit):
                rewards, loss, g = reward_gradient(
                    task.reward,
                    trajectory.final,
                    surrogate.weights,
                    task.method.threshold,
                    microbatch=task.microbatch or plan.reward_microbatch,
                )
            with timed(seconds, "vjp", model.device):
                active = torch.nonzero(g.flatten(1).any(1)).flatten().tolist()
                if parameters and active:
                    streamed_vjps(
                        model,
                        task.conditioning,
                        rolled,
                        surrogate,
                        g * task.scale,
                        mode=mode or plan.mode,
                        sink=goal,
                        active=active,
                        ready=refuse_infinite,
                    )
                elif parameters and goal is not None:
                    model.sums.deliver(goal)
        except BaseException:
            model.sums.discard()  # no step would own these sums
            raise
        finally:
            rolled.drop()
        found = {name: own.grads[name] for name in parameters} if own is not None else {}
    return GradientResult(
        loss, rewards, surrogate.weights, surrogate.d_j, surrogate.d_0, found, pairs=task.steps, seconds=seconds
    )


@contextmanager
def reward_phase(model: StreamedModel, visit: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside the block the device belongs to the reward: the transformer's weights leave it if the plan says so.

    Args:
        visit: makes the context in which the reward's models are on the device.
    """
    if model.plan.reward_residency == "off":
        model.release_resident()
    with model.ledger.phase("reward"), visit():
        yield


@torch.no_grad()
def streamed_rollout(
    model: StreamedModel,
    conditioning: Mapping[str, Any],
    noise: Tensor,
    sigmas: Tensor,
    steps: Steps | None = None,
    *,
    keep_block_inputs: bool = False,
    levels: int | None = None,
) -> StreamedRollout:
    """The trajectory of a streamed model: modulation once for all steps, every step layer-major.

    Args:
        noise: (B, ...) float32 or float64, on any device; the latents stay there.
        sigmas: (T + 1,) falling to 0.
        steps: where the model will be differentiated, and so the velocities to be kept; None for nowhere.
        keep_block_inputs: also keep the inputs of the blocks there: n B times the model's depth (or every n-th block's,
            as the memory plan says) hidden states.
        levels: noise levels whose modulation is there at once; None for all, as products at `steps` need them.
    """
    batch = noise.shape[0]
    steps = [()] * batch if steps is None else steps
    sigmas = sigmas.to(device=noise.device, dtype=noise.dtype)
    levels = levels or len(sigmas) - 1
    assert levels >= len(sigmas) - 1 or not steps[0], "products read the modulation of all levels"
    with model.ledger.phase("hoist"):
        modulations = model.hoist(_condition_rows(model, conditioning, sigmas[:-1][:levels], batch))
    record = model.record(batch * len(steps[0])) if keep_block_inputs and steps[0] else None

    def evaluate(step: int, rows: slice, latents: Tensor) -> Tensor:
        nonlocal modulations
        assert (rows.start, rows.stop) == (0, batch), "layer-major: the model itself splits the batch"
        if step and step % levels == 0 and modulations is not None:
            modulations.drop()
            modulations = model.hoist(_condition_rows(model, conditioning, sigmas[step:-1][:levels], batch))
        row = step % levels * batch
        kept = [(b, n * batch + b) for n in range(len(steps[0])) for b in range(batch) if steps[b][n] == step]
        output = model.evaluate(
            _inputs(model, latents, sigmas[step].expand(batch), conditioning),
            modulations=_rows(modulations, range(row, row + batch)),
            record=record if kept else None,
            record_rows=kept if record else (),
        )
        return output.to(latents.dtype)

    with model.ledger.phase("rollout"):
        trajectory = euler(evaluate, noise, sigmas, keep=steps)
    return StreamedRollout(trajectory, steps, modulations, record)


@torch.no_grad()
def streamed_vjps(
    model: StreamedModel,
    conditioning: Mapping[str, Any],
    rolled: StreamedRollout,
    surrogate: Surrogate,
    g: Tensor,
    *,
    mode: Mode,
    sink: Sink | None,
    active: Sequence[int] | None = None,
    ready: Callable[[Sequence[Leg], Sequence[int]], None] | None = None,
) -> None:
    """Run the surrogate's legs from g = dL/dx_0 (eq. 10) and deliver every weight gradient once, finished, to `sink`.

    Without a sink the weight gradients of all legs are added to the sums that the model holds.

    A leg that passes a gradient on runs before those that need it: "paired" for its input gradient alone, and in the
    last pass once more beside all the others; "held" with its weight gradients, which then wait on the host. Where the
    discount is 0 no leg needs another one, and all run in one pass in either mode.

    Args:
        rolled: of the same model and conditioning; its steps are the legs', so sample b's leg l is at steps[b][-1 - l].
        g: (B, ...) in the latents' dtype.
        active: the samples to take; None for all. The others' g must be zero: they add nothing.
        ready: called with the legs of the last product and their samples before it runs; what it raises comes before
            anything is delivered.
    """
    trajectory, steps, batch = rolled.trajectory, rolled.steps, g.shape[0]
    samples = list(range(batch) if active is None else active)
    count, nested = len(surrogate.legs), surrogate.discount != 0
    assert {len(row) for row in steps} == {count}, "the rollout was made for another number of legs"
    if not samples:
        return
    everyone = len(samples) == batch
    given = conditioning if everyone else select(conditioning, torch.tensor(samples))
    y, u = g if everyone else g[samples], None
    waiting: list[Leg] = []
    for index, planned in enumerate(surrogate.legs):
        slot = count - 1 - index
        passes_on = nested and index + 1 < count
        at = [steps[b][slot] for b in samples]
        sigma, latents = trajectory.sigmas[at], trajectory.latents[at, samples]
        coefficient = planned.coefficient if everyone else planned.coefficient[samples]
        cotangent, y = leg_cotangent(y, u, surrogate.discount, coefficient, dtype=model.store.dtype)
        leg = Leg(
            inputs=_inputs(model, latents, sigma, given),
            cotangent=cotangent,
            input_grads=("hidden_states",) if passes_on else (),
            modulations=_rows(rolled.modulations, [step * batch + b for step, b in zip(at, samples, strict=True)]),
            record=rolled.record,
            record_rows=[slot * batch + b for b in samples] if rolled.record else None,
        )
        if passes_on:
            with model.ledger.phase("input gradient" if mode == "paired" else "first leg"):
                (found,) = model.vjp([leg], params="none" if mode == "paired" else "accumulate")
            u = found["hidden_states"].to(y.device)
        if not (passes_on and mode == "held"):
            waiting.append(replace(leg, input_grads=()))  # with the record that a first pass has filled
    if ready is not None:
        ready(waiting, samples)
    with model.ledger.phase("weight gradients"):
        model.vjp(waiting, params="accumulate" if sink is None else "deliver", sink=sink)


def refuse_infinite(legs: Sequence[Leg], samples: Sequence[int]) -> None:
    """FloatingPointError naming the samples of which a leg's cotangent is not finite.

    A sink that updates weights would find out when the first units have been changed already.
    """
    for leg in legs:
        check_finite(leg.cotangent, "the gradient at a leap's latents", samples)


@contextmanager
def streamed_model(
    transformer: nn.Module, microbatch: int | None, *, reward_microbatch: int = 1
) -> Iterator[StreamedModel]:
    """The transformer itself if it is a StreamedModel, else one made of it inside the block.

    Raises:
        ValueError: a module whose weights are not in host memory, or that cannot be streamed.
    """
    if isinstance(transformer, StreamedModel):
        yield transformer
        return
    weights = {parameter: parameter.data for parameter in transformer.parameters()}
    away = next((parameter.device for parameter in weights if parameter.device.type != "cpu"), None)
    if away is not None:
        raise ValueError(f"transformer is on {away}: a streamed executor takes a StreamedModel or a module on the CPU")
    try:
        plan = MemoryPlan(microbatch=microbatch, reward_microbatch=reward_microbatch)
        model = StreamedModel(transformer, plan)
        try:
            yield model
        finally:
            model.close()
    finally:
        for parameter, values in weights.items():  # unchanged, and where other holders of this memory look for them
            parameter.data = values


def _inputs(model: StreamedModel, latents: Tensor, sigma: Tensor, conditioning: Mapping[str, Any]) -> dict[str, Any]:
    """What `leapalign.engine.backbones.velocity.velocity` would call the model with; `sigma` is (B,)."""
    return {"hidden_states": latents.to(model.store.dtype), "timestep": sigma * timestep_scale(model), **conditioning}


def _condition_rows(
    model: StreamedModel, conditioning: Mapping[str, Any], sigmas: Tensor, batch: int
) -> dict[str, Tensor]:
    """What modulation depends on: row i B + b is sample b at noise level sigmas[i]."""
    rows = {"timestep": sigmas.repeat_interleave(batch) * timestep_scale(model)}
    for name in model.backbone.condition_inputs:
        value = conditioning.get(name)
        if value is not None and is_batched(name, value):
            rows[name] = value.repeat(sigmas.shape[0], *[1] * (value.ndim - 1))
    return rows


def _rows(modulations: Modulations | None, index: Sequence[int]) -> ModulationRows | None:
    return None if modulations is None else modulations.rows(index)
