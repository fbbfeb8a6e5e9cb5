"""Do weights depend on where things were? A run of the embedded default, and the same with one decision changed.

Changes of PLACE move bytes or repeat the same arithmetic: every bit of weights and optimizer states stays.

Changes of ORDER add the same float32 numbers in another order, so gradients differ by roundings, which a run carries
on: AdamW divides by √v, so that an element whose gradient is all rounding moves by a full step in another direction,
and moments on the edge between two 8-bit codes take different ones. What such runs may differ by is shown by the
YARDSTICK: the same run with every gradient off by 2e-5 of its norm, which is as far as two executors may be apart in
float32. The measure is the distance of the weights over the length of their way, |w_a - w_b| / |w_a - w_0|.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import record
from leapalign.config.loading import load_config
from leapalign.data.embeddings import EmbeddingStore
from leapalign.data.prompts import load_prompts
from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.gradients import Sink
from leapalign.families.pipeline import load_pipeline
from leapalign.gradients import alignment_gradients
from leapalign.method.draws import draw_noise, draw_prompts, draw_steps
from leapalign.method.leapalign import LeapAlign
from leapalign.planning.configured import configured_reward, prompt_store
from leapalign.rewards.latent import LatentReward
from leapalign.rewards.protocol import RewardModel

BATCH, ROLLOUT_STEPS = 2, 3
ALPHA, TAU = 0.3, 0.1
SEED = 0
THRESHOLD = 10.0  # above every reward: all samples are active at every step
Snapshot = dict[str, Tensor]  # weights by name and optimizer states by name/kind: copies


@dataclass(frozen=True)
class Task:
    """What all runs share.

    Attributes:
        pipeline: as for `load_pipeline`.
        prompts: with their embeddings.
        resolution: pixels.
    """

    pipeline: str
    prompts: list[str]
    embeddings: EmbeddingStore
    reward: RewardModel
    resolution: int


@dataclass(frozen=True)
class Change:
    """What one run does differently.

    Attributes:
        plan: fields of the MemoryPlan.
        threads: of torch, throughout.
        update_threads: of torch while the optimizer works.
        error: at every step each parameter's gradient is off by this part of its norm, in a drawn direction.
        ulp: the first step's gradients become their neighbours in float32, up or down as drawn.
        alpha: the discount of the nested gradient; another one is another method, not another order.
    """

    plan: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    update_threads: int = 1
    error: float = 0.0
    ulp: bool = False
    alpha: float = ALPHA


def _plan(**changes: Any) -> Change:
    return Change(plan=changes)


PLACE = {
    "optimizer on the device": _plan(optimizer_on="device"),
    "3 slots": _plan(slots=3),
    "1 block resident": _plan(resident=1),
    "all resident, away during the reward": _plan(resident="all", reward_residency="off"),
    "block inputs on the device": _plan(block_inputs="device"),
    "every 2nd block input": _plan(every=2),
    "rollout keeps no block inputs": _plan(keep_block_inputs=False),
    "reward recomputes its blocks": _plan(checkpoint_reward=True),
    "update by 2 threads": Change(update_threads=2),
    "all at once": Change(
        plan={
            "optimizer_on": "device",
            "slots": 3,
            "resident": 1,
            "reward_residency": "off",
            "block_inputs": "device",
            "every": 2,
            "keep_block_inputs": False,
            "checkpoint_reward": True,
        },
        update_threads=2,
    ),
}
YARDSTICK = Change(error=2e-5)
ORDER = {
    "held": _plan(mode="held"),
    "microbatch 2": _plan(microbatch=2),
    # On a CPU a product with a matrix of one row splits its sum between threads: dL/dtemb of the modulation linears.
    "2 threads throughout": Change(threads=2),
}


def train(
    task: Task, change: Change, *, keep: Collection[int], dtype: torch.dtype, learning_rate: float = 1e-4
) -> dict[int, Snapshot]:
    """Run to the last of the steps in `keep` and return {step: weights and states after it}; 0 is the beginning.

    AdamW with 8-bit moments updates every unit inside the backward pass. bfloat16 weights round stochastically and are
    clipped by unit; float32 ones are not clipped, since a norm would spread one element's rounding over all.

    Args:
        dtype: of the weights, bfloat16 or float32.
    """
    with _threads(change.threads):
        pipeline = load_pipeline(task.pipeline, plan=MemoryPlan(**change.plan), weight_dtype=dtype)
        model = pipeline.transformer
        assert isinstance(model, StreamedModel)
        optimizer = model.optimizer = AdamW8bit(lr=learning_rate, clip="none" if dtype == torch.float32 else "block")
        optimizer.bind(model)
        sigmas = pipeline.sigmas(ROLLOUT_STEPS, task.resolution)
        shape = pipeline.latent_shape(task.resolution)
        found = {0: snapshot(model)} if 0 in keep else {}
        try:
            for step in range(1, max(keep) + 1):
                texts = [task.prompts[i] for i in draw_prompts(SEED, step - 1, BATCH, len(task.prompts))]
                with optimizer.in_backward() as sink:
                    alignment_gradients(
                        model,
                        pipeline.conditioning(task.embeddings.batch(texts), task.resolution, 1.0),
                        draw_noise(SEED, step, range(BATCH), shape),
                        sigmas,
                        LatentReward(pipeline, task.reward, texts),
                        LeapAlign(change.alpha, TAU, THRESHOLD),
                        pairs=draw_steps(LeapAlign(), SEED, step, range(BATCH), ROLLOUT_STEPS),
                        executor="streamed",
                        sink=_Between(sink, change, step),
                    )
                if step in keep:
                    found[step] = snapshot(model)
        finally:
            model.close()
    return found


def snapshot(model: StreamedModel) -> Snapshot:
    """Copies of all weights, and of the optimizer's states as name/kind."""
    assert model.optimizer is not None
    model.streamer.drain()
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        states = model.optimizer.state[parameter]
        found |= {f"{name}/{kind}": value.clone() for kind, value in states.items() if isinstance(value, Tensor)}
    return found


def different(ours: Snapshot, theirs: Snapshot) -> list[str]:
    """Names of the tensors of which a bit differs."""
    assert ours.keys() == theirs.keys()
    return [name for name, values in ours.items() if not torch.equal(values, theirs[name])]


def distance(ours: Snapshot, theirs: Snapshot, start: Snapshot) -> float:
    """|w_theirs - w_ours| / |w_ours - w_start| over all weights, in float64."""
    return _norm(theirs, ours) / _norm(ours, start)


def _norm(ours: Snapshot, theirs: Snapshot) -> float:
    weights = [name for name in ours if "/" not in name]
    return math.sqrt(sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in weights))


class _Between:
    """A sink in front of the optimizer's: sets the threads of the update, and moves gradients if the change says so."""

    def __init__(self, sink: Sink, change: Change, step: int) -> None:
        self.on_host = sink.on_host
        self._sink, self._change, self._first = sink, change, step == 1
        self._generator = torch.Generator().manual_seed(step)

    def __call__(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct]) -> None:
        if self._change.error or (self._change.ulp and self._first):
            gradients = {name: self._moved(gradient) for name, gradient in gradients.items()}
        with _threads(max(self._change.update_threads, torch.get_num_threads())):
            self._sink(unit, gradients)

    def _moved(self, gradient: Tensor | OuterProduct) -> Tensor:
        whole = gradient.expand() if isinstance(gradient, OuterProduct) else gradient
        signs = torch.where(torch.rand(whole.shape, generator=self._generator) < 0.5, 1.0, -1.0).to(whole.device)
        if self._change.ulp:
            return torch.nextafter(whole, signs * math.inf)
        return whole + signs * (self._change.error * whole.square().mean().sqrt())  # every sign is of norm sqrt(numel)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch computes with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- the benchmark -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench bits`."""
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--only", choices=["place", "order"], help="one kind of change; nothing is written")
    parser.add_argument("--name", default="bits-shapes", help="result file's name (default: %(default)s)")


def run(options: argparse.Namespace, unknown: list[str]) -> int:
    """Make all runs and write the result file. Exit code 2 for wrong settings."""
    if unknown or options.steps < 1:
        wrong = f"unknown argument {unknown[0]}" if unknown else f"--steps {options.steps} must be at least 1"
        print(f"bench bits: error: {wrong}; see --help", file=sys.stderr)
        return 2
    task = shapes()
    place = _places(task, options.steps) if options.only != "order" else {}
    order = _orders(task, options.steps) if options.only != "place" else {}
    if options.only is None:
        method = asdict(LeapAlign(ALPHA, TAU, THRESHOLD))
        settings = {"batch": BATCH, "rollout_steps": ROLLOUT_STEPS, "steps": options.steps, "method": method}
        results = {"settings": settings, "different_tensors": place, "distance_by_step": order}
        path = record.write(options.name, ["bits", "--steps", str(options.steps)], results, seeds=[SEED])
        print(f"wrote {path.name}")
    return 0


def shapes() -> Task:
    """The embedded default with 8 of its prompts."""
    config = load_config("shapes", ["--device", "cpu"])
    prompts = [prompt.text for prompt in load_prompts(config.train_prompts, key="train_prompts")][:8]
    return Task("shapes", prompts, prompt_store(config, prompts), configured_reward(config), config.resolution)


def _places(task: Task, steps: int) -> dict[str, int]:
    """{change: number of tensors of which a bit differs}, bfloat16 weights."""
    base = train(task, Change(), keep=[steps], dtype=torch.bfloat16)[steps]
    found = {}
    for name, change in PLACE.items():
        other = train(task, change, keep=[steps], dtype=torch.bfloat16)[steps]
        found[name] = len(different(base, other))
        print(f"{name}: {found[name] or 'none'} of {len(base)} tensors differ", flush=True)
    return found


def _orders(task: Task, steps: int) -> dict[str, dict[str, float]]:
    """{change: {step: distance}}, float32 weights."""
    keep = sorted({0, 1, 2, 5, 10, 20, steps} & set(range(steps + 1)))
    base = train(task, Change(), keep=keep, dtype=torch.float32)
    found = {}
    yardsticks = {"gradients off by 2e-5": YARDSTICK, "first gradient off by one ulp": Change(ulp=True)}
    for name, change in {**yardsticks, **ORDER}.items():
        other = train(task, change, keep=keep, dtype=torch.float32)
        found[name] = {str(step): distance(base[step], other[step], base[0]) for step in keep[1:]}
        print(f"{name}: {', '.join(f'step {step} {value:.1e}' for step, value in found[name].items())}", flush=True)
    return found
