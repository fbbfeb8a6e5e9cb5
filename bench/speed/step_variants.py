"""One optimizer step, several ways: what `python -m bench throughput` and `python -m bench gpu` measure.

    streamed    the engine: weights and 8-bit AdamW states on the host, everything else as planned for a device cap
    resident    everything on the device: decoupled phases (executor "autograd"), blocks recomputed in backward
    plain       what one would write without the engine: the paper's Algorithm 1 with both leaps and the reward in one
                autograd graph, diffusers' gradient checkpointing, gradients and an 8-bit AdamW on the device

All take the same noise, leaps, prompts and embeddings, bfloat16 weights, and VAE and reward in float32. The threshold
is above every reward, so that every image has a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bench.speed import random_models
from bench.speed.random_models import Sizes
from leapalign.engine.ledger import Measured
from leapalign.engine.memory.available import host_available
from leapalign.engine.memory.sizes import parse_bytes, spell_bytes
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.costs import predict
from leapalign.engine.planning.planner import Planner
from leapalign.engine.planning.workload import DEVICE_BASE, Budget, Machine, Workload
from leapalign.engine.streaming.partition import meta_transformer
from leapalign.families import flux
from leapalign.families.pipeline import FlowPipeline
from leapalign.gradients import alignment_gradients
from leapalign.method.draws import draw_noise, draw_steps
from leapalign.method.leapalign import LeapAlign
from leapalign.method.task import timed
from leapalign.planning.workload import SLACK
from leapalign.rewards.latent import LatentReward

DTYPE = torch.bfloat16
METHOD = LeapAlign(alpha=0.1, tau=0.1, threshold=10.0)
GUIDANCE, LEARNING_RATE = 3.5, 1e-5
SEED = 0  # of noise and pairs; weights and embeddings have their own
_SHOWN = 0.95  # of what a card is sold as, it shows at least: of 24 GiB 23.5
_SAMPLED = 2**16  # elements of a parameter that are looked at for changes


@dataclass(frozen=True)
class Task:
    """What is to be done.

    Attributes:
        resolution: pixels a side.
        batch, steps: images and rollout steps of an optimizer step.
        device: that computes.
        microbatch: images at once in the engine; None: the planner's choice.
    """

    sizes: Sizes
    resolution: int
    batch: int
    steps: int
    device: torch.device
    microbatch: int | None = None

    def described(self) -> dict[str, Any]:
        """For a result file."""
        blocks = [self.sizes.transformer[key] for key in ("num_layers", "num_single_layers")]
        return {"blocks": blocks, "resolution": self.resolution, "batch": self.batch, "steps": self.steps}

    def workload(self, kernels: Literal["auto", "torch"] = "auto") -> Workload:
        """For the planner."""
        return Workload(
            batch=self.batch,
            resolution=self.resolution,
            patch=self.sizes.patch,
            text_tokens=self.sizes.text_tokens,
            num_inference_steps=self.steps,
            microbatch=self.microbatch,
            dtype=DTYPE,
            kernels=kernels,
            rewards=self.sizes.reward_loads(self.resolution),
        )


@dataclass(frozen=True)
class Step:
    """One step's wall-clock seconds by phase, in the order of the phases, and its loss."""

    seconds: Mapping[str, float]
    loss: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass
class Way(ABC):
    """A model, its optimizer and a reward, ready for steps. `close` before another one is made.

    Attributes:
        pipeline, reward: random ones of the task's sizes.
        optimizer_name: in words.
        microbatch: images at once in the transformer; None: as planned.
        memory: {phase: the most since the first step}; device bytes where there is a GPU.
    """

    task: Task
    pipeline: FlowPipeline
    reward: Any
    optimizer_name: str
    microbatch: int | None = None
    memory: dict[str, Measured] = field(default_factory=dict)

    @abstractmethod
    def step(self, number: int, steps: int) -> Step:
        """One optimizer step with a rollout of so many steps."""

    @abstractmethod
    def flops(self, steps: int) -> int:
        """Of such a step: matrix products, convolutions and attention, what is computed twice twice."""

    def smaller(self) -> bool:
        """Take half the images at once from now on; False if there is only one."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Let go of what would outlive this object: threads, host memory, the allocator's limit."""

    def sample(self) -> list[Tensor]:
        """Copies of some weights of the first and the last linear layers, to see that steps change them."""
        matrices = [p for p in self.pipeline.transformer.parameters() if p.ndim == 2]
        return [p.detach().view(-1)[:_SAMPLED].to("cpu", copy=True) for p in (matrices[0], matrices[-1])]

    def _given(self, number: int, steps: int) -> dict[str, Any]:
        """The arguments of `alignment_gradients` but for the executor's."""
        task, pipeline = self.task, self.pipeline
        embeds = random_models.embeddings(task.sizes, task.batch)
        noise = draw_noise(SEED, number, range(task.batch), pipeline.latent_shape(task.resolution))
        return {
            "transformer": pipeline.transformer,
            "conditioning": pipeline.conditioning(embeds, task.resolution, GUIDANCE),
            "noise": noise.to(pipeline.home),
            "sigmas": pipeline.sigmas(steps, task.resolution),
            "reward": LatentReward(pipeline, self.reward, random_models.prompts(task.batch)),
            "method": METHOD,
            "pairs": draw_steps(LeapAlign(), SEED, number, range(task.batch), steps),
        }


def pipeline_of(task: Task, transformer: Any, vae: Any) -> FlowPipeline:
    """The pipeline of a transformer and a VAE that are there."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(task.sizes.scheduler))
    return FlowPipeline(transformer, vae, scheduler, "random", flux.family)


# ---- streamed ------------------------------------------------------------------------------------------------------


class Streamed(Way):
    """The engine under a cap.

    Attributes:
        plan: for the cap, with its predictions for a step of the task.
        model: obeys it.
        copied: bytes of the last step's copies, "h2d_bytes" and "d2h_bytes".
    """

    def __init__(
        self,
        task: Task,
        planner: Planner,
        budget: Budget,
        *,
        held_to: int | None = None,
        arena: Callable[[Mapping[str, int]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """
        Args:
            planner: of the task's workload; it may serve several budgets.
            budget: device and host memory.
            held_to: bytes of the device that torch's allocator is held to; None: what is planned for.
            arena: makes the host memory, as for `StreamedModel`.

        Raises:
            BudgetError: nothing fits.
        """
        self._planner = planner
        self.plan = planner.plan(budget)
        if task.device.type == "cuda":
            cap(task.device, budget.device_bytes if held_to is None else held_to)
        reward, vae = random_models.reward(task.sizes, task.device), random_models.vae(task.sizes, task.device)
        if self.plan.checkpoint_reward:
            vae.enable_gradient_checkpointing()
        module = meta_transformer(task.sizes.transformer, DTYPE)
        optimizer = AdamW8bit(lr=LEARNING_RATE, clip="block")
        self.model = StreamedModel(module, self.plan, optimizer, device=task.device, arena=arena)
        random_models.fill(self.model.store, task.device)
        self.copied: dict[str, int] = {}
        super().__init__(task, pipeline_of(task, self.model, vae), reward, "AdamW8bit of leapalign")
        if task.device.type == "cuda":
            torch.cuda.empty_cache()  # what drew the weights is in the way of what is planned

    def step(self, number: int, steps: int) -> Step:
        assert self.model.optimizer is not None
        given = self._given(number, steps)
        seconds: dict[str, float] = {}
        before = dict(self.model.streamer.copied)
        with timed(seconds, "whole", self.task.device), self.model.optimizer.in_backward() as sink:
            found = alignment_gradients(**given, executor="streamed", sink=sink)
        phases = dict(found.seconds)
        phases["update"] = max(seconds["whole"] - sum(phases.values()), 0)  # all that the products did not wait for
        grow(self.memory, self.model.ledger.row(number)["memory"])
        done = self.model.streamer.copied
        self.copied = {"h2d_bytes": done["in"] - before["in"], "d2h_bytes": done["out"] - before["out"]}
        return Step(phases, float(found.loss))

    def predicted(self, steps: int) -> MemoryPlan:
        """The plan with predictions for a rollout of so many steps."""
        workload = replace(self._planner.workload, num_inference_steps=steps)
        return predict(self._planner.costs, self.plan, workload, self._planner.machine)

    def flops(self, steps: int) -> int:
        return sum(phase.flops for phase in self.predicted(steps).phases)

    def close(self) -> None:
        self.model.close()
        if self.task.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.task.device)


def streamed(
    task: Task,
    planner: Planner,
    limit: int,
    ram: int | None,
    *,
    arena: Callable[[Mapping[str, int]], Mapping[str, Tensor]] | None = None,
) -> Streamed:
    """As a run on a card of `limit` bytes is: SLACK is left by the plan, and the allocator may use it for its gaps.

    Raises:
        BudgetError: nothing fits.
    """
    return Streamed(task, planner, Budget(int(limit * (1 - SLACK)), ram), held_to=limit, arena=arena)


def host_bytes(wanted: str | None) -> int | None:
    """Of the host's memory, for plans: what is wanted, or what is free but SLACK if that is less; None: not known."""
    free = host_available()
    limits = [None if wanted is None else parse_bytes(wanted, "ram"), None if free is None else int(free * (1 - SLACK))]
    return min((limit for limit in limits if limit is not None), default=None)


def card_bytes(device: torch.device) -> int:
    """All of a GPU's memory; of a CPU 0, which has none of its own. Makes a CUDA context."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def cap_on(card: int, limit: int) -> int:
    """The bytes that a cap is on a card of so many: all of a card that is sold as that. On a CPU (0) any cap is one.

    Raises:
        ValueError: the card is smaller than the cap.
    """
    if 0 < card < _SHOWN * limit:
        raise ValueError(f"the card has {spell_bytes(card)}")
    return min(limit, card) if card else limit


def planner_of(task: Task, machine: Machine) -> Planner:
    """Plans for the task, by a machine's rates."""
    return Planner(task.sizes.transformer, task.workload(), machine)


def cap(device: torch.device, limit: float) -> None:
    """Hold torch's allocator to so many bytes, less what no allocator shows."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(max((limit - DEVICE_BASE) / total, 0.0), 1.0), device)


def grow(memory: dict[str, Measured], found: Mapping[str, Mapping[str, int | None]]) -> None:
    """Keep the most of each phase."""
    for phase, row in found.items():
        kept = memory.setdefault(phase, Measured())
        kept.device_bytes = max(filter(None, (kept.device_bytes, row["device_bytes"])), default=None)
        kept.host_bytes = max(filter(None, (kept.host_bytes, row["host_bytes"])), default=None)
