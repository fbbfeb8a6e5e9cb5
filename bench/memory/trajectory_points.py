"""One point of memory against trajectory length: a method, so many differentiated steps, one batch.

    full_autograd               n Euler steps in one graph, every activation kept
    full_checkpointed           the same with a checkpoint a block, as diffusers' enable_gradient_checkpointing does it
    full_step_checkpointed      and one more around every step, so that only latents wait: a forward more a step
    leapalign_one_graph         LeapAlign as published: two leaps in one graph, with a checkpoint a block
    engine_paired               the streamed engine, block inputs kept by the rollout; one leg a step
    engine_held                 the streamed engine, every leg computed again from its latents

The gradient of the first three and of the engine is the same one, that of the last n steps, exactly; at n = 2 the
engine's two legs cost the same as LeapAlign's. The rollout before these steps is part of every method. The reward is of
none: the gradient at the final latents is given. In the engine it is a phase of its own; in one graph it comes on top.

Every method's weights and gradients are counted where the method has them: on the device for one graph, as blocks
that visit the device for the engine. No method's optimizer states are.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.memory.devices import HostAndDevice
from bench.memory.one_graph import backpropagate_leaps, backpropagate_steps, checkpoint_blocks
from bench.memory.simulate import Workload, latents_shape, make_conditioning, make_transformer, simulate
from leapalign.engine.planning.counting import DeviceCounter, gpu_operators
from leapalign.engine.streaming.partition import default_dtype

ONE_GRAPH = ("full_autograd", "full_checkpointed", "full_step_checkpointed", "leapalign_one_graph")
ENGINE = ("engine_paired", "engine_held")
METHODS = (*ONE_GRAPH, *ENGINE)
ALPHA = 0.3  # LeapAlign's discount


def exists(method: str, length: int) -> bool:
    """Whether the method has so many differentiated steps."""
    return method != "leapalign_one_graph" or length == 2


def engine_workload(workload: Workload, method: str) -> Workload:
    """The workload in the engine's mode of that name."""
    paired = method == "engine_paired"
    return replace(workload, mode="paired" if paired else "held", keep_block_inputs=paired)


def count(workload: Workload, method: str) -> dict[str, float]:
    """A point counted on fake tensors; `workload.legs` is the number of differentiated steps.

    Returns:
        peak_bytes: of device memory, by operators' results and what autograd keeps.
        forwards_per_image: FLOPs of the whole step in those of a forward.
        host_bytes: of the engine, as its plan predicts them; a graph needs none.
    """
    if method in ENGINE:
        workload = engine_workload(workload, method)
        found = simulate(workload)
        return {
            "peak_bytes": found.counted_peak_bytes,
            "forwards_per_image": found.forwards_per_image,
            "host_bytes": workload.planned().peak_host_bytes,
        }
    return _count_graph(workload, method)


def _count_graph(workload: Workload, method: str) -> dict[str, float]:
    """The rollout before the differentiated steps is not run: it holds less than the first of them, without grad."""
    machine, counter = HostAndDevice(), DeviceCounter()
    legs, shape = workload.legs, latents_shape(workload)
    with machine, gpu_operators(), torch.device("meta"):
        with default_dtype(workload.dtype):
            transformer = make_transformer(workload).eval()
        conditioning = make_conditioning(workload, "meta")
        latents, sigmas, g = torch.empty(3, *shape), torch.empty(legs + 1), torch.empty(shape)
        with machine.observed(counter.observe):
            counter.hold(transformer.parameters(), "weights")
            with counter.phase("forward"), torch.no_grad():
                inputs = {"hidden_states": latents[0].to(workload.dtype), "timestep": sigmas[:1].expand(shape[0])}
                transformer(**inputs, **conditioning)
            forward = counter.flops
            run_graph(method, transformer, conditioning, latents, sigmas, g)
    differentiated = (counter.flops - forward) / forward
    return {
        "peak_bytes": counter.peak,
        "forwards_per_image": _rollout_steps(workload, method) + differentiated,
        "host_bytes": 0,
    }


def _rollout_steps(workload: Workload, method: str) -> int:
    """Evaluations without grad: LeapAlign rolls out all steps, and then evaluates its leaps."""
    return workload.steps - (0 if method == "leapalign_one_graph" else workload.legs)


def run_graph(
    method: str, transformer: torch.nn.Module, conditioning: dict[str, torch.Tensor], latents: torch.Tensor,
    sigmas: torch.Tensor, g: torch.Tensor,
) -> None:  # fmt: skip
    """The differentiated part of a method in one graph.

    Args:
        latents: (n, B, ...) of which the first are at the first differentiated step; LeapAlign reads three.
        sigmas: (n + 1,) from there on.
        g: (B, ...) gradient at the final latents.
    """
    if method != "full_autograd":
        checkpoint_blocks(transformer)
    if method == "leapalign_one_graph":
        backpropagate_leaps(transformer, conditioning, latents[:3], sigmas, g, alpha=ALPHA)
    else:
        steps = method == "full_step_checkpointed"
        backpropagate_steps(transformer, conditioning, latents[0], sigmas, g, checkpoint_steps=steps)
