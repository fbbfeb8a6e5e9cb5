"""The planned peak is the counted one: predictions against whole steps on fake tensors, and against known numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from bench.memory.simulate import Workload as Step
from bench.memory.simulate import simulate
from leapalign.engine.backbones import backbone_of
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.costs import predict
from leapalign.engine.planning.planner import Planner
from leapalign.engine.planning.stage_costs import StageCosts
from leapalign.engine.planning.traffic import Traffic
from leapalign.engine.planning.workload import Machine, RewardLoad, Workload
from leapalign.families.flux import FLUX1_DEV

GIB = 2**30
FLUX = {
    "attention_head_dim": 64,
    "axes_dims_rope": (8, 28, 28),
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 256,
    "num_attention_heads": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "patch_size": 1,
    "pooled_projection_dim": 64,
}
SCHNELL = {**FLUX, "guidance_embeds": False, "num_attention_heads": 6, "num_layers": 1, "num_single_layers": 2}
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 32,
    "caption_projection_dim": 256,
    "dual_attention_layers": (0,),
    "in_channels": 16,
    "joint_attention_dim": 192,
    "num_attention_heads": 8,
    "num_layers": 2,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 96,
    "pos_embed_max_size": 64,
    "qk_norm": "rms_norm",
    "sample_size": 32,
}
MODELS = {"flux": FLUX, "schnell": SCHNELL, "sd3": SD3}
PLANS = [  # every setting beside every model, in turn
    MemoryPlan(),
    MemoryPlan(resident="all", microbatch=2),
    MemoryPlan(block_inputs="device"),
    MemoryPlan(resident=1, slots=3),
    MemoryPlan(microbatch=2, every=2),
    MemoryPlan(hoist=False, microbatch=None),
    MemoryPlan(microbatch=None, resident=2),
]
KEEP = [True, False, True]
MATRIX = [
    (
        model,
        resolution,
        batch,
        mode,
        PLANS[index % len(PLANS)],
        KEEP[index % len(KEEP)],
        ("torch", "triton")[index // 2 % 2],
    )
    for index, (model, resolution, batch, mode) in enumerate(
        itertools.product(MODELS, (192, 448), (1, 3), ("paired", "held"))
    )
]


@pytest.mark.parametrize(
    ("model", "resolution", "batch", "mode", "plan", "keep", "kernels"),
    MATRIX,
    ids=lambda value: str(value) if not isinstance(value, MemoryPlan) else f"plan{PLANS.index(value)}",
)
def test_the_planned_peak_is_the_counted_one(model, resolution, batch, mode, plan, keep, kernels):
    """Within 5% and not below; and so are the FLOPs of the step."""
    plan = dataclasses.replace(plan, kernels=kernels)
    step = Step(MODELS[model], batch, resolution, 2, mode, keep, plan, text_tokens=64)
    counted, planned = simulate(step), step.planned()
    hoisted = {"hoist"} if plan.hoist else set()
    assert 0.999 <= planned.peak_device_bytes / counted.counted_peak_bytes <= 1.05
    assert {phase.name for phase in planned.phases} == counted.phases.keys() - {"model"} - ({"hoist"} - hoisted)
    assert sum(phase.flops for phase in planned.phases) == pytest.approx(counted.flops, rel=0.03)
    for phase in planned.phases:  # what is made on first use counts everywhere in the plan
        assert phase.device_bytes >= 0.999 * counted.phases[phase.name].counted_bytes
        assert phase.device_bytes == sum(v for k, v in phase.breakdown.items() if k.startswith("device"))
        assert phase.host_bytes == sum(v for k, v in phase.breakdown.items() if k.startswith("host"))


@pytest.fixture(scope="module")
def flux_dev():
    """Costs of the real model at 512 pixels, batch 8."""
    workload = Workload(batch=8, resolution=512)
    return Planner(FLUX1_DEV, workload).costs, workload


def test_bytes_and_flops_of_the_real_model(flux_dev):
    """The numbers that rule the design: 25 forwards of 21.5 TFLOP, 16.1 GiB without modulation, weights once a pass."""
    costs, workload = flux_dev
    plan = predict(costs, MemoryPlan(resident="all"), workload)
    phases = {phase.name: phase for phase in plan.phases}
    assert phases["rollout"].flops == pytest.approx(8 * 25 * 21.5e12, rel=0.01)
    assert phases["weight gradients"].flops == pytest.approx(8 * 6 * 21.5e12, rel=0.03)
    assert phases["rollout"].breakdown["device: resident weights"] == pytest.approx(16.1 * GIB, rel=0.01)
    streamed = {phase.name: phase for phase in predict(costs, MemoryPlan(), workload).phases}
    weights = 25 * 16.1 * GIB
    states = 8 * 25 * 58 * 9 * 2**20  # a block's input: 1536 tokens x 3072 x 2 bytes
    assert streamed["rollout"].h2d_bytes == pytest.approx(weights + states, rel=0.03)
    assert streamed["hoist"].h2d_bytes == pytest.approx(3.247e9 * 2, rel=0.02)


def test_host_bytes_of_the_real_model(flux_dev):
    """At most 4.1 bytes a parameter, kept block inputs and 2 GiB where a leg is run twice; 2 more for held sums."""
    costs, workload = flux_dev
    parameters = 11_901_408_320
    for batch in (1, 8):
        given = dataclasses.replace(workload, batch=batch)
        plan = predict(costs, MemoryPlan(), given)
        kept = plan.phases[0].breakdown["host: kept block inputs"]
        assert kept == pytest.approx(2 * batch * 0.50 * GIB, rel=0.05)  # 0.50 GiB a sample and leg
        assert plan.peak_host_bytes <= 4.1 * parameters + kept + 2 * GIB
        held = predict(costs, MemoryPlan(mode="held"), given)
        assert held.peak_host_bytes - plan.peak_host_bytes == pytest.approx(2 * parameters, rel=0.02)


def test_what_the_weights_and_states_take_on_the_host(flux_dev):
    costs, workload = flux_dev
    parameters = 11_901_408_320

    def states(**changes):
        plan = predict(costs, MemoryPlan(), dataclasses.replace(workload, **changes))
        return plan.phases[0].breakdown["host: optimizer"] / parameters

    assert states() == pytest.approx(2 + 8 / 256, rel=1e-3)
    assert states(master="residual") == pytest.approx(3 + 8 / 256, rel=1e-3)
    assert states(master="float32") == pytest.approx(6 + 8 / 256, rel=1e-3)
    assert states(ema=True) == pytest.approx(4 + 8 / 256, rel=1e-3)
    assert states(optimizer="gradients") == pytest.approx(4, rel=1e-3)


def test_accumulation_holds_gradients_and_updates_at_the_end(flux_dev):
    costs, workload = flux_dev
    plan = predict(costs, MemoryPlan(), dataclasses.replace(workload, gradient_accumulation_steps=4))
    single = predict(costs, MemoryPlan(), workload)
    assert [phase.name for phase in plan.phases][-1] == "update" and single.phases[-1].name == "weight gradients"
    assert plan.phases[1].flops == 4 * single.phases[1].flops
    assert (
        plan.phases[0].breakdown["host: held gradients"] > 0
        and "host: held gradients" not in single.phases[0].breakdown
    )


def test_the_reward_runs_without_the_transformer(flux_dev):
    costs, workload = flux_dev
    given = dataclasses.replace(workload, rewards=(RewardLoad(GIB, 10 * GIB, 10**12),))
    on, off = (predict(costs, MemoryPlan(resident="all", reward_residency=where), given) for where in ("on", "off"))
    names = [phase.name for phase in on.phases]
    assert names == ["hoist", "rollout", "reward", "input gradient", "weight gradients"]
    assert on.phases[2].device_bytes > 27 * GIB > 12 * GIB > off.phases[2].device_bytes > 11 * GIB
    assert off.phases[2].h2d_bytes > 16 * GIB  # the weights come back


def test_seconds_are_those_of_the_slowest():
    machine = Machine(100, 10, 5, 20, seconds_per_call=0)
    assert Traffic(flops=200, h2d=10, d2h=5, host=10).seconds(machine) == 2
    assert Traffic(flops=100, h2d=30, d2h=5, host=10).seconds(machine) == 3
    assert Traffic(flops=100, h2d=10, d2h=20, host=10).seconds(machine) == 4
    assert Traffic(flops=100, h2d=10, d2h=5, host=100).seconds(machine) == 5


def test_blocks_of_one_kind_are_counted_once():
    costs = Planner({**FLUX, "num_layers": 6, "num_single_layers": 8}, Workload(batch=1, resolution=192)).costs
    assert len(costs.parts) == 16
    assert len(costs.kinds) == 5  # stem, double, single, the last single, which drops its context, head


def test_a_backbone_of_another_device_is_refused():
    torch.manual_seed(0)
    from diffusers import FluxTransformer2DModel

    backbone = backbone_of(FluxTransformer2DModel(**FLUX), hoist=True, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="device='meta'"):
        StageCosts(backbone, Workload())


def test_weight_gradients_are_added_and_freed_one_by_one(flux_dev):
    """Of a block's gradients two are alive at once at most: one is added while the other is made."""
    costs, _ = flux_dev
    for part in costs.kinds[1:-1]:
        largest = 2 * max(math.prod(shape) for shape in part.unit.shapes.values())  # bytes in bfloat16
        with_weights, without = (costs.backward(part, 1, params=params).device_bytes for params in (True, False))
        assert largest <= with_weights - without <= 2 * largest < 2 * part.unit.numel
