"""A step of the streamed engine on a model of any size with fake tensors: what the device would hold and compute.

Everything is the code that trains: StreamedModel, rollout, vector-Jacobian products, and a gradient dictionary on the
host in the optimizer's place. Only memory and arithmetic are missing. The reward, which runs between rollout and
products without the transformer on the card, is no part of it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor, nn

from bench.memory.devices import HostAndDevice
from leapalign.engine.backbones import Backbone, backbone_of
from leapalign.engine.model import StreamedModel
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning import workload as planning
from leapalign.engine.planning.costs import predict
from leapalign.engine.planning.counting import DeviceCounter, Holding, Phase, gpu_operators
from leapalign.engine.planning.planner import Planner
from leapalign.engine.planning.workload import PATCH, Budget, Machine
from leapalign.engine.streaming.gradients import GradientDictionary
from leapalign.engine.streaming.partition import default_dtype
from leapalign.executors.streamed import streamed_rollout, streamed_vjps
from leapalign.families.flux import FLUX1_DEV
from leapalign.method.surrogates import Leg, Surrogate

SEED = 0  # of the steps that are differentiated
_MACHINE = Machine(device_base_bytes=0)  # no operator shows what a CUDA context takes


@dataclass(frozen=True)
class Workload:
    """One optimizer step to simulate.

    Attributes:
        architecture: arguments of FluxTransformer2DModel, or of the diffusers class that "_class_name" names.
        batch: images, all of them with a gradient.
        resolution: pixels a side.
        steps: of the rollout, at least 2.
        mode: how the legs share a step (leapalign.executors.streamed).
        keep_block_inputs: the rollout keeps the block inputs of the legs; else they are computed again.
        plan: the engine's; mode and keep_block_inputs are this workload's.
        text_tokens: of the prompt; 512 is FLUX's.
        legs: differentiated evaluations, each nested in the next; at most `steps`.
        patch: pixels of a token's side.
        dtype: of the weights.
    """

    architecture: Mapping[str, Any] = field(default_factory=lambda: FLUX1_DEV)
    batch: int = 8
    resolution: int = 512
    steps: int = 25
    mode: Literal["paired", "held"] = "paired"
    keep_block_inputs: bool = True
    plan: MemoryPlan = field(default_factory=MemoryPlan)
    text_tokens: int = 512
    legs: int = 2
    patch: int = PATCH
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("steps", 2), ("legs", 1), ("text_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.legs > self.steps:
            raise ValueError(f"legs={self.legs} of a rollout of steps={self.steps}: give at most as many legs as steps")
        if self.resolution < self.patch or self.resolution % self.patch:
            raise ValueError(f"resolution={self.resolution} must be a multiple of {self.patch} pixels")

    def planned(self) -> MemoryPlan:
        """The plan with the planner's predictions."""
        plan = replace(self.plan, mode=self.mode, keep_block_inputs=self.keep_block_inputs)
        workload = self._planning(None)
        return predict(Planner(self.architecture, workload, hoist=plan.hoist).costs, plan, workload, _MACHINE)

    def within(self, budget: Budget, *, microbatch: int | None) -> Workload:
        """This workload with the plan that the planner makes for the budget.

        Raises:
            ValueError: nothing fits.
        """
        plan = Planner(self.architecture, self._planning(microbatch), _MACHINE).plan(budget)
        return replace(self, plan=plan, keep_block_inputs=plan.keep_block_inputs)

    def _planning(self, microbatch: int | None) -> planning.Workload:
        return planning.Workload(
            batch=self.batch,
            resolution=self.resolution,
            text_tokens=self.text_tokens,
            patch=self.patch,
            num_inference_steps=self.steps,
            legs=self.legs,
            microbatch=microbatch,
            mode=self.mode,
            dtype=self.dtype,
            kernels="triton" if self.plan.kernels == "triton" else "torch",
            optimizer="gradients",
        )


@dataclass(frozen=True)
class Simulated:
    """What a workload takes on the device.

    Attributes:
        counted_peak_bytes: the most bytes alive at once.
        phases: {"model" (what is allocated for good), "hoist", "rollout", ...: bytes and FLOPs}.
        flops: of the whole step.
        forward_flops: of one plain forward of one image.
        forwards_per_image: flops / batch / forward_flops.
        parameters: of the model.
        holdings: what was alive at the peak, largest first.
    """

    counted_peak_bytes: int
    phases: Mapping[str, Phase]
    flops: int
    forward_flops: int
    forwards_per_image: float
    parameters: int
    holdings: list[Holding]


def simulate(workload: Workload) -> Simulated:
    """Run one step of this workload on fake tensors, `meta` playing the GPU and `cpu` the host."""
    machine = HostAndDevice()
    with machine, gpu_operators():
        forward_flops = _plain_forward(workload, machine)
        with default_dtype(workload.dtype):
            transformer = make_transformer(workload)
        parameters = sum(parameter.numel() for parameter in transformer.parameters())
        counter = DeviceCounter()
        # Not observed: its templates' parameters, placeholders on meta that no operator ever sees.
        plan = workload.plan
        backbone = backbone_of(transformer, hoist=plan.hoist, device=torch.device("meta"), kernels=plan.kernels)
        conditioning = make_conditioning(workload, "cpu")
        noise, sigmas = torch.empty(latents_shape(workload)), torch.empty(workload.steps + 1)
        steps = _steps(workload)
        sink = GradientDictionary()
        with machine.observed(counter.observe):
            with counter.phase("model"):
                model = _PhasedModel(backbone, workload.plan, counter)
            rolled = streamed_rollout(
                model, conditioning, noise, sigmas, steps, keep_block_inputs=workload.keep_block_inputs
            )
            streamed_vjps(
                model,
                conditioning,
                rolled,
                _surrogate(workload),
                torch.empty_like(noise),
                mode=workload.mode,
                sink=sink,
            )
        missing = {name for name, _ in transformer.named_parameters()} - sink.grads.keys()
        assert not missing, f"no gradient was delivered for {sorted(missing)[:3]}"
    return Simulated(
        counted_peak_bytes=counter.peak,
        phases=counter.phases,
        flops=counter.flops,
        forward_flops=forward_flops,
        forwards_per_image=counter.flops / workload.batch / forward_flops,
        parameters=parameters,
        holdings=counter.holdings(),
    )


class _PhasedModel(StreamedModel):
    """A streamed model that names its phases to a counter."""

    def __init__(self, backbone: Backbone, plan: MemoryPlan, counter: DeviceCounter) -> None:
        super().__init__(backbone, plan, arena=_fake_arena)
        self._counter = counter

    def hoist(self, *args: Any, **options: Any) -> Any:
        with self._counter.phase("hoist"):
            return super().hoist(*args, **options)

    def evaluate(self, *args: Any, **options: Any) -> Any:
        with self._counter.phase("rollout"):
            return super().evaluate(*args, **options)

    def vjp(self, legs: Any, *, params: Any = "none", **options: Any) -> Any:
        name = {"none": "input gradient", "accumulate": "first leg", "deliver": "weight gradients"}[params]
        with self._counter.phase(name):
            return super().vjp(legs, params=params, **options)


def _plain_forward(workload: Workload, machine: HostAndDevice) -> int:
    """FLOPs of the transformer called once with one image."""
    with default_dtype(workload.dtype), torch.device("meta"):
        transformer = make_transformer(workload).eval()
    counter = DeviceCounter()
    with machine.observed(counter.observe), torch.no_grad():
        transformer(
            hidden_states=torch.empty(1, *latents_shape(workload)[1:], dtype=workload.dtype, device="meta"),
            timestep=torch.empty(1, device="meta"),
            **{name: v[:1] if name[-4:] != "_ids" else v for name, v in make_conditioning(workload, "meta").items()},
        )
    return counter.flops


def make_transformer(workload: Workload) -> nn.Module:
    """The diffusers model of the workload's architecture, in the default dtype."""
    kind = getattr(diffusers, workload.architecture.get("_class_name", "FluxTransformer2DModel"))
    module: nn.Module = kind(**{name: value for name, value in workload.architecture.items() if name[0] != "_"})
    return module


def _is_flux(workload: Workload) -> bool:
    return bool(workload.architecture.get("_class_name", "FluxTransformer2DModel") == "FluxTransformer2DModel")


def latents_shape(workload: Workload) -> tuple[int, ...]:
    """(batch, ...) of the latents: packed for FLUX, pictures for SD3."""
    tokens, channels = workload.resolution // workload.patch, workload.architecture["in_channels"]
    if _is_flux(workload):
        return workload.batch, tokens**2, channels
    side = tokens * workload.architecture["patch_size"]
    return workload.batch, channels, side, side


def make_conditioning(workload: Workload, device: str) -> dict[str, Tensor]:
    """The transformer's other inputs, with nothing in them."""
    batch = workload.batch

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=workload.dtype, device=device)

    conditioning = {
        "encoder_hidden_states": empty(batch, workload.text_tokens, workload.architecture["joint_attention_dim"]),
        "pooled_projections": empty(batch, workload.architecture["pooled_projection_dim"]),
    }
    if not _is_flux(workload):
        return conditioning
    conditioning["txt_ids"] = empty(workload.text_tokens, 3)
    conditioning["img_ids"] = empty(latents_shape(workload)[1], 3)
    if workload.architecture.get("guidance_embeds"):
        conditioning["guidance"] = torch.empty(batch, device=device)
    return conditioning


def _steps(workload: Workload) -> list[list[int]]:
    """Different steps a sample, one a leg, in rising order."""
    draw = random.Random(SEED)
    return [sorted(draw.sample(range(workload.steps), workload.legs)) for _ in range(workload.batch)]


def _surrogate(workload: Workload) -> Surrogate:
    """Nested legs, two for LeapAlign; what the numbers are does not matter here, only that there is a discount."""
    batch = workload.batch
    legs = tuple(Leg(torch.empty(batch, dtype=torch.int64), torch.empty(batch)) for _ in range(workload.legs))
    scores = [torch.empty(batch) for _ in range(3)]
    return Surrogate(legs, 0.3, *scores)


def _fake_arena(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
