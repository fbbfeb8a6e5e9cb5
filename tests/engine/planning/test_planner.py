"""Budget in, plan out: more memory is never slower, and what is refused says what would fit."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leapalign.engine.backbones import SequentialBackbone
from leapalign.engine.memory.sizes import parse_bytes, spell_bytes
from leapalign.engine.model import StreamedModel
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.planner import BudgetError, Planner, fits, plan_memory
from leapalign.engine.planning.workload import Budget, Machine, RewardLoad, Workload

FLUX = {
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
    "in_channels": 16,
    "joint_attention_dim": 32,
    "num_attention_heads": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "patch_size": 1,
    "pooled_projection_dim": 24,
}
MIB = 2**20
WORKLOAD = Workload(
    batch=6,
    resolution=256,
    text_tokens=16,
    num_inference_steps=4,
    rewards=(
        RewardLoad(MIB, 12 * MIB, 10**9, blocks=100),
        RewardLoad(MIB, 6 * MIB, 2 * 10**9, checkpointed=True, blocks=100),
    ),
)
# Slow copies, so that all decisions matter for so small a model.
MACHINE = Machine(1e12, 1e9, 1e9, 1e9, seconds_per_call=1e-5, device_base_bytes=0)


@pytest.fixture(scope="module")
def planner():
    return Planner(FLUX, WORKLOAD, MACHINE)


@pytest.fixture(scope="module")
def plans(planner):
    return planner.plans()


# ---- the planner ---------------------------------------------------------------------------------------------------


def budgets(plans):
    """Budgets around what the plans of the test's model take."""
    device = [plan.peak_device_bytes for plan in plans]
    host = [plan.peak_host_bytes for plan in plans]
    return (
        st.integers(min(device) * 9 // 10, max(device) * 11 // 10),
        st.integers(min(host) * 9 // 10, max(host) * 11 // 10),
    )


@settings(max_examples=100)
@given(data=st.data())
def test_more_budget_is_never_slower(planner, plans, data):
    device, host = budgets(plans)
    vram, ram = data.draw(device), data.draw(host)
    more = Budget(vram + data.draw(st.integers(0, 50 * MIB)), ram + data.draw(st.integers(0, 50 * MIB)))
    try:
        small = planner.plan(Budget(vram, ram))
    except BudgetError:
        return
    assert small.peak_device_bytes <= vram and small.peak_host_bytes <= ram
    assert planner.plan(more).seconds <= small.seconds


def refusal(planner, budget):
    try:
        planner.plan(budget)
    except BudgetError as error:
        return error
    return None


@settings(max_examples=40)
@given(data=st.data())
def test_a_refusal_names_a_setting_that_is_accepted(planner, plans, data):
    """The text alone suffices: sizes in it are read back."""
    device, host = budgets(plans)
    budget = Budget(
        data.draw(st.one_of(device, st.integers(MIB, 4 * MIB))),
        data.draw(st.one_of(host, st.integers(MIB, 2**30))),
    )
    error = refusal(planner, budget)
    if error is not None:
        message = str(error)
        assert "\n" not in message and ("device memory" in message or "host memory" in message)
        words = message.partition("give ")[2].split()
        larger = {name: words[words.index(name) + 1] for name in ("vram", "ram") if name in words}
        batch = int(message.rpartition(" to ")[2]) if "batch from" in message else WORKLOAD.batch
        assert larger or batch < WORKLOAD.batch
        wanted = Budget(**{"vram": budget.vram, "ram": budget.ram, **larger})
        assert (wanted, batch) == (error.budget, error.workload.batch)
        chosen = Planner(FLUX, error.workload, MACHINE) if batch < WORKLOAD.batch else planner
        assert fits(chosen.plan(wanted), wanted)


def test_without_limits_the_fastest_plan(planner, plans):
    plan = planner.plan(Budget())
    assert plan.seconds == min(each.seconds for each in plans)
    same = [each for each in plans if each.seconds == plan.seconds]
    assert plan.peak_device_bytes == min(each.peak_device_bytes for each in same)


def test_little_memory_takes_other_decisions(planner, plans):
    roomy = planner.plan(Budget())
    least = min(plans, key=lambda plan: plan.peak_device_bytes)
    tight = planner.plan(Budget(vram=least.peak_device_bytes))
    assert tight.seconds > roomy.seconds
    assert (tight.microbatch, tight.block_inputs, tight.checkpoint_reward) == (1, "host", True)
    assert tight.reward_microbatch == 1 < roomy.reward_microbatch
    host = min(plan.peak_host_bytes for plan in plans)
    assert planner.plan(Budget(ram=host)).block_inputs == "device"


def test_what_the_user_fixed_stays():
    workload = dataclasses.replace(WORKLOAD, microbatch=3, mode="held", optimizer_on="host")
    for plan in Planner(FLUX, workload, MACHINE).plans():
        assert (plan.microbatch, plan.mode, plan.optimizer_on) == (3, "held", "host")
        assert plan.reward_microbatch == 3


@pytest.mark.parametrize("budget", [Budget("1MiB"), Budget("1MiB", "10MiB"), Budget(None, "10MiB")])
def test_what_is_missing_is_what_a_refusal_gives(planner, budget):
    with pytest.raises(BudgetError) as caught:
        planner.plan(budget)
    assert planner.shortage(budget) == caught.value.larger != {}
    assert planner.shortage(Budget()) == {}


def test_a_refusal_says_the_number_the_limit_and_the_way_out(planner, plans):
    with pytest.raises(
        BudgetError, match=r"vram = 1\.00MiB is too little: the step needs \d.*whatever the batch; give"
    ):
        planner.plan(Budget(vram="1MiB"))
    with pytest.raises(BudgetError, match=r"ram = 10\.00MiB is too little: .* of host memory"):
        planner.plan(Budget(ram="10MiB"))
    limit = min(plan.peak_host_bytes for plan in plans) - 1
    with pytest.raises(BudgetError, match="lower the batch from 6 to 5"):
        planner.plan(Budget(ram=limit))


@pytest.mark.parametrize(("batch", "expected"), [(6, {1, 2, 4, 6}), (64, {1, 2, 4, 8, 64}), (65, {1, 2, 4, 8})])
def test_how_many_pictures_the_reward_takes_at_once(batch, expected):
    """More of them are launched less often: each number is the quickest within some budget."""
    workload = dataclasses.replace(WORKLOAD, batch=batch, rewards=(RewardLoad(MIB, MIB, 1, blocks=100),))
    plans = Planner(FLUX, workload, MACHINE).plans()
    assert {plan.reward_microbatch for plan in plans} == expected
    phases = {plan.reward_microbatch: phase for plan in plans for phase in plan.phases if phase.name == "reward"}
    for rows, phase in phases.items():
        assert phase.breakdown["device: reward"] == (1 + rows) * MIB
        assert phase.seconds >= -(-batch // rows) * 100 * 3 * MACHINE.seconds_per_call


def test_sampling_alone_holds_nothing_for_gradients():
    load = RewardLoad(MIB, MIB, 10**9, blocks=10)
    sampling = dataclasses.replace(WORKLOAD, legs=0, rewards=(load,))
    drawn, trained = (
        Planner(FLUX, workload, MACHINE).plan(Budget())
        for workload in (sampling, dataclasses.replace(sampling, legs=2, clip="global"))
    )
    assert [phase.name for phase in drawn.phases] == ["hoist", "rollout", "reward"]
    held = {name for phase in drawn.phases for name in phase.breakdown}
    gradients = {"device: gradient buffer", "device: kept block inputs", "host: optimizer", "host: held gradients"}
    assert not held & gradients and {"host: optimizer", "host: held gradients"} <= trained.phases[0].breakdown.keys()
    assert drawn.peak_device_bytes < trained.peak_device_bytes and drawn.peak_host_bytes < trained.peak_host_bytes
    with pytest.raises(BudgetError, match="sampling needs"):
        Planner(FLUX, sampling, MACHINE).plan(Budget(vram="1MiB"))


def test_what_is_compared_is_what_is_planned(planner, plans):
    """The planner compares bare numbers; those of the plans made of them are the same, to the last bit."""
    prospects = list(planner._prospects(WORKLOAD))
    assert len(prospects) == len(plans)
    for prospect, plan in zip(prospects, plans, strict=True):
        for name in ("seconds", "peak_device_bytes", "peak_host_bytes"):
            assert getattr(prospect, name) == getattr(plan, name)


def test_the_model_may_be_a_config_a_file_a_folder_or_a_module(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **FLUX}))
    with torch.device("meta"):
        module = FluxTransformer2DModel(**FLUX).to(torch.bfloat16)
    workload = dataclasses.replace(WORKLOAD, batch=1, rewards=())
    plans = [plan_memory(model, Budget("1GiB"), workload) for model in (FLUX, tmp_path, str(tmp_path), module)]
    assert all(plan == plans[0] for plan in plans) and plans[0].phases
    with pytest.raises(ValueError, match="config.json"):
        plan_memory(tmp_path / "nowhere", Budget(), workload)
    with pytest.raises(ValueError, match="no such class in diffusers"):
        plan_memory({"_class_name": "Nothing"}, Budget(), workload)


def test_a_modules_own_dtype_counts():
    module = FluxTransformer2DModel(**FLUX)
    workload = dataclasses.replace(WORKLOAD, batch=1, rewards=())
    whole, half = plan_memory(module, None, workload), plan_memory(FLUX, None, workload)
    weights = [plan.phases[0].breakdown["host: weights"] for plan in (whole, half)]
    assert weights[0] == pytest.approx(2 * weights[1], rel=0.05)


def test_another_model_says_its_inputs():
    layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    model = nn.ModuleDict({"blocks": layers, "out": nn.Linear(32, 8)})
    backbone = SequentialBackbone(
        model,
        layers,
        stem=lambda m, inputs: inputs["x"],
        head=lambda m, carried, _: m["out"](*carried),
        device=torch.device("meta"),
    )
    workload = Workload(batch=2, num_inference_steps=0, legs=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="give the workload of this model its inputs"):
        plan_memory(backbone, None, workload)
    given = dataclasses.replace(workload, inputs={"x": torch.empty(1, 32, device="meta")})
    plan = plan_memory(backbone, None, given)
    assert [phase.name for phase in plan.phases] == ["weight gradients"]
    assert not plan.hoist


@pytest.mark.parametrize("resident", [1, 2, "all"])
def test_a_plan_of_the_planner_runs(resident, make_transformer, make_inputs):
    transformer = make_transformer("flux-guidance")
    noise, conditioning = make_inputs("flux-guidance", 2)
    inputs = {"hidden_states": noise, "timestep": torch.tensor([0.2, 0.7]), **conditioning}
    with torch.no_grad():
        expected = transformer(**inputs).sample
        workload = Workload(batch=2, resolution=48, text_tokens=4, num_inference_steps=0, legs=1)
        plan = plan_memory(transformer, Budget(), workload)
        model = StreamedModel(transformer, dataclasses.replace(plan, resident=resident), device="cpu")
        torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
        model.release_resident()
        torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
    model.close()


# ---- plans, budgets, machines --------------------------------------------------------------------------------------


def test_a_plan_by_hand_has_no_predictions():
    plan = MemoryPlan()
    assert (plan.phases, plan.peak_device_bytes, plan.peak_host_bytes, plan.seconds) == ((), 0, 0, 0)
    assert json.loads(json.dumps(plan.as_dict()))["mode"] == "paired"


def test_a_plan_comes_back_from_json(planner):
    for plan in (MemoryPlan(microbatch=None, resident=2), planner.plan(Budget())):
        assert MemoryPlan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"speed": 1}, "unknown speed"),
        ({"mode": None}, "without mode"),
        ({"slots": 1}, "slots=1"),
        ({"phases": [{"name": "rollout"}]}, "phase without device_bytes"),
    ],
)
def test_no_plan_comes_back_from_something_else(change, expected):
    values = {
        name: value for name, value in (MemoryPlan().as_dict() | change).items() if value is not None or name != "mode"
    }
    with pytest.raises(ValueError, match=expected) as caught:
        MemoryPlan.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("resident", "blocks", "ends"), [("none", 0, False), (0, 0, False), (2, 2, True), (9, 4, True), ("all", 4, True)]
)
def test_resident_blocks(resident, blocks, ends):
    plan = MemoryPlan(resident=resident)
    assert (plan.resident_blocks(4), plan.keeps_ends) == (blocks, ends)


@pytest.mark.parametrize(
    "wrong",
    [{"resident": "some"}, {"resident": -1}, {"resident": True}, {"mode": "both"}, {"optimizer_on": "gpu"},
     {"reward_residency": "maybe"}, {"block_inputs": "disk"}, {"slots": 1}, {"every": 0}, {"microbatch": 0}],
)  # fmt: skip
def test_a_wrong_decision_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MemoryPlan(**wrong)


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("1.5 MiB", 3 * 2**19), ("512", 512), (512, 512), ("2gib", 2**31),
     ("1e9", 10**9), ("10KB", 10_000)],
)  # fmt: skip
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "24 gigs", "-3GiB", "0", "nan", None, True])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="give a size such as 24GiB"):
        parse_bytes(text, "vram")


@given(st.integers(1, 2**45))
def test_a_spelt_size_is_read_back_and_not_smaller(count):
    assert count <= parse_bytes(spell_bytes(count)) <= count * 1.01 + 1


def test_a_machine_is_read_from_a_file(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text('{"flops_per_s": 4e14}')
    assert Machine.read(path) == Machine(flops_per_s=4e14)
    for text, told in {
        "{": "is no JSON file: ",
        "{}": "no rate in it; give an object with some of d2h_bytes_per_s, ",
        '{"machine": {}}': "no rate in it; give an object",
        "[]": "no object; give an object with some of d2h_bytes_per_s, ",
        '{"speed": 1, "flops_per_s": 1}': "speed unknown; give an object",
        '{"flops_per_s": "fast"}': "flops_per_s='fast' must be a number",
        '{"flops_per_s": 0}': "flops_per_s=0 must be above 0",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"machine=.*{re.escape(told)}"):
            Machine.read(path)
    with pytest.raises(ValueError, match=r"machine=.*`leapalign doctor --output FILE.json` writes one"):
        Machine.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"legs": -1},
        {"num_inference_steps": -1},
        {"resolution": 500},
        {"microbatch": 9},
        {"microbatch": 0},
    ],
)
def test_a_wrong_workload_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Workload(**wrong)
