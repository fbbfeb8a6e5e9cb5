"""From a config to its plan: what is to be done, the memory there is, and refusals in the config's keys."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from leapalign.config.loading import load_config
from leapalign.engine.memory.sizes import parse_bytes
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.costs import predict
from leapalign.engine.planning.planner import fits
from leapalign.engine.planning.workload import Budget
from leapalign.errors import UsageError
from leapalign.families.autoencoder import PUBLISHED as VAE
from leapalign.families.source import transformer_config, vae_config
from leapalign.planning import workload as planning
from leapalign.planning.reward_loads import count_reward, reward_loads
from leapalign.planning.workload import plan_run, planner_of, run_budget, sampling_workload, workload_of
from leapalign.rewards import clipscore
from leapalign.rewards.loading import tower_of

GIB = 2**30
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def small(*words):
    """The packaged pipeline under the streamed executor."""
    return load_config("shapes", ["--executor=streamed", "--train_batch_size=6", *words])


@pytest.fixture
def machine(monkeypatch):
    """machine(device, host): so much memory is free."""

    monkeypatch.setattr(planning, "SLACK", 0)

    def make(device, host):
        monkeypatch.setattr(planning, "device_available", lambda place: device if place.type == "cuda" else None)
        monkeypatch.setattr(planning, "host_available", lambda: host)

    return make


# ---- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "free", "expected", "notes"),
    [
        ([], (20 * GIB, 50 * GIB), (20 * GIB, 50 * GIB), []),
        (["--vram=8GiB", "--ram=32GiB"], (20 * GIB, 50 * GIB), (8 * GIB, 32 * GIB), []),
        (
            ["--vram=24GiB", "--ram=64GiB"],
            (20 * GIB, 50 * GIB),
            (20 * GIB, 50 * GIB),
            ["vram = 24GiB, but 20.00GiB are free on cuda:0", "ram = 64GiB, but 50.00GiB are free on this machine"],
        ),
        (["--vram=8GiB"], (None, None), (8 * GIB, None), []),
    ],
)
def test_the_budget_is_the_least_of_what_is_given_and_free(machine, words, free, expected, notes):
    machine(*free)
    budget, told = run_budget(small(*words), CUDA)
    assert (budget.vram, budget.ram) == expected
    assert told == [f"{note}: planned for that" for note in notes]


@pytest.mark.parametrize(
    ("words", "free", "expected"),
    [
        ([], 10 * GIB, (5 * GIB, 5 * GIB)),
        (["--ram=8GiB"], 10 * GIB, (4 * GIB, 4 * GIB)),
        (["--vram=1GiB"], 10 * GIB, (GIB, 9 * GIB)),
        (["--vram=9GiB"], 10 * GIB, (5 * GIB, 5 * GIB)),
        (["--vram=9GiB"], None, (9 * GIB, None)),
    ],
)
def test_on_a_cpu_both_kinds_of_memory_are_the_hosts(machine, words, free, expected):
    machine(0, free)
    budget, _ = run_budget(small(*words), CPU)
    assert (budget.vram, budget.ram) == expected


def test_some_of_what_is_free_is_left(machine, monkeypatch):
    machine(20 * GIB, 50 * GIB)
    monkeypatch.setattr(planning, "SLACK", 0.25)
    assert run_budget(small("--vram=8GiB"), CUDA)[0] == Budget(8 * GIB, int(37.5 * GIB)), "what is given is taken whole"
    assert run_budget(small(), CUDA, slack=0)[0] == Budget(20 * GIB, 50 * GIB)


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_a_run_and_sampling_are_planned_within_the_budget(machine):
    machine(None, 8 * GIB)
    config = small()
    budget, _ = run_budget(config, CPU)
    for sampling, last in ((False, "weight gradients"), (True, "reward")):
        plan = plan_run(config, CPU, workload=sampling_workload(config) if sampling else None)
        assert fits(plan, budget) and last in plan.phases[-1].name + plan.phases[-2].name
        assert MemoryPlan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
        assert all("device: base" not in phase.breakdown for phase in plan.phases)  # no context on a CPU
    assert [phase.name for phase in plan.phases] == ["hoist", "rollout", "reward"]


def test_a_budget_that_is_given_is_taken(machine):
    machine(0, 0)
    assert plan_run(small(), CUDA, budget=Budget("4GiB", "8GiB")).peak_device_bytes <= 4 * GIB


def test_what_the_config_leaves_open_is_the_planners():
    config = small()
    open_, fixed = workload_of(config), workload_of(small("--microbatch=3", "--streamed_mode=held"))
    assert (open_.microbatch, open_.mode, open_.optimizer_on) == (config.microbatch, None, None)
    assert (fixed.microbatch, fixed.mode) == (3, "held")
    assert (open_.batch, open_.resolution, open_.legs) == (6, config.resolution, 2)
    drawn = sampling_workload(config)
    assert (drawn.legs, drawn.num_inference_steps, drawn.batch) == (0, config.validation_inference_steps, 6)


def test_a_planner_is_made_once():
    config, again = small(), small("--seed=5")
    make = planning.planner_of
    first = make(config, workload_of(config), planning.machine_of(CPU))
    assert make(again, workload_of(again), planning.machine_of(CPU)) is first
    assert make(config, sampling_workload(config), planning.machine_of(CPU)) is not first


def test_another_executor_has_no_plan():
    config = load_config("shapes", ["--executor=autograd"])
    for make in (workload_of, sampling_workload):
        with pytest.raises(UsageError, match="executor = autograd has no memory plan"):
            make(config)


# ---- refusals ------------------------------------------------------------------------------------------------------


def refused(config, device=CUDA):
    with pytest.raises(UsageError) as caught:
        plan_run(config, device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def given(message):
    """{key: size} of the way out."""
    words = message.partition("; ")[2].replace("give ", "").split(" and ")
    return dict(part.split() for part in words)


@pytest.mark.parametrize("words", [["--vram=10MiB"], ["--ram=1GiB"], ["--vram=10MiB", "--ram=1GiB"]])
def test_a_key_that_is_too_small_is_named_with_the_way_out(machine, words):
    machine(80 * GIB, 80 * GIB)
    message = refused(small(*words))
    key, value = words[0].removeprefix("--").split("=")
    assert message.startswith(f"{key} = {value} is too little: the step needs ")
    larger = given(message)
    assert larger.keys() == {word.removeprefix("--").split("=")[0] for word in words}
    plan_run(small(*(f"--{key}={size}" for key, size in larger.items())), CUDA)


def test_a_smaller_batch_is_the_first_way_out(machine):
    machine(80 * GIB, 80 * GIB)
    config = small("--train_batch_size=16")
    planner = planner_of(config, workload_of(config), planning.machine_of(CUDA))
    least = min(prospect.peak_device_bytes for prospect in planner._best)
    message = refused(small("--train_batch_size=16", f"--vram={least - 1}"))
    before, _, batch = message.rpartition(" to ")
    assert before.endswith("; lower train_batch_size from 16")
    plan_run(small(f"--train_batch_size={batch}", f"--vram={least - 1}"), CUDA)


def test_a_machine_that_is_too_small_is_named(machine):
    machine(10 * 2**20, 80 * GIB)
    message = refused(small())
    assert message.startswith("vram = null: 10.00MiB of device memory free on cuda:0 is too little: the step needs ")
    assert "; end other programs, or use a machine with vram " in message
    machine(80 * GIB, GIB)
    assert refused(small("--ram=3GiB")).startswith("ram = 3GiB: 1.00GiB of host memory free on this machine is too")


def test_on_a_cpu_more_ram_is_the_way_out(machine):
    machine(None, 80 * GIB)
    message = refused(small("--ram=1GiB"), CPU)
    assert message.startswith("ram = 1GiB, halved on a CPU, is too little: the step needs ")
    larger = given(message)
    assert larger.keys() == {"ram"} and parse_bytes(larger["ram"]) > GIB
    plan_run(small(f"--ram={larger['ram']}"), CPU)


# ---- the bytes of the real model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [512, 1024])
def test_the_host_holds_four_bytes_a_parameter(resolution):
    """4.1 bytes, the kept block inputs and 2 GiB, the reward's weights apart; paired, clipped by block, no average."""
    config = load_config("flux1_dev_24gb", [f"--resolution={resolution}", "--train_batch_size=4"])
    assert (config.clip, config.use_ema) == ("block", False)
    workload = workload_of(config)
    costs = planner_of(config, workload, planning.machine_of(CUDA)).costs
    for place in ("host", "device"):
        plan = predict(costs, MemoryPlan(block_inputs=place), workload)
        held = plan.phases[0].breakdown
        kept = held.get("host: kept block inputs", 0)
        assert bool(kept) == (place == "host")
        assert plan.peak_host_bytes - held["host: reward"] <= 4.1 * 11_901_408_320 + kept + 2 * GIB


# ---- the reward ----------------------------------------------------------------------------------------------------


def test_the_rewards_memory():
    """PickScore's and the VAE's weights in float32; recomputing the VAE's blocks halves the rest."""
    config = load_config("flux1_dev_24gb", ["--resolution=512"])
    whole, recomputed = reward_loads(config)
    assert whole.weight_bytes == recomputed.weight_bytes == 4 * (986_109_441 + 83_819_683)
    assert 5 * GIB < whole.activation_bytes < 8 * GIB
    assert recomputed.activation_bytes < 0.6 * whole.activation_bytes
    assert whole.flops < recomputed.flops < 1.5 * whole.flops
    blocks = 32 + (4 * 3 + 2) + 1  # CLIP's layers, the decoder's residual blocks (with those in the middle), attention
    assert whole.blocks == recomputed.blocks == blocks
    (drawn,) = reward_loads(config, gradients=False)
    assert drawn.activation_bytes < recomputed.activation_bytes and drawn.flops < 0.6 * whole.flops


@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_pictures_take_twice_the_memory_of_one(checkpointed):
    """Within 2%: what is planned for a microbatch is a multiple of one picture's activations."""
    clip = clipscore.PUBLISHED
    shapes = json.dumps(dict(VAE)), (clip.parameters, json.dumps(dict(clip.vision))), 256, checkpointed
    one, two = count_reward(*shapes), count_reward(*shapes, pictures=2)
    assert two.activation_bytes == pytest.approx(2 * one.activation_bytes, rel=0.02)
    assert two.flops == 2 * one.flops and two.weight_bytes == one.weight_bytes


def test_a_clip_model_in_a_folder_is_read(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 99}, vision_config={**tower, "image_size": 28, "patch_size": 14},
        projection_dim=16,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    run = small("--reward=clipscore", f"--reward_model_name_or_path={tmp_path}")
    found = tower_of(run.reward, run.reward_model_name_or_path)
    assert found is not None
    assert found.parameters == sum(each.numel() for each in CLIPModel(config).parameters())
    assert found.vision["num_hidden_layers"] == 2
    plain, scored = reward_loads(small())[0], reward_loads(run)[0]
    assert scored.weight_bytes - plain.weight_bytes == 4 * found.parameters
    assert scored.blocks - plain.blocks == 2 and scored.flops > plain.flops
    assert tower_of(small().reward, None) is None


def test_shapes_that_are_nowhere_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = small("--reward=pickscore", f"--reward_model_name_or_path={tmp_path}")
    with pytest.raises(UsageError, match="reward_model_name_or_path = .* could not be read"):
        reward_loads(config)
    unknown = small("--pretrained_model_name_or_path=someone/something")
    with pytest.raises(
        UsageError, match="pretrained_model_name_or_path = 'someone/something': transformer/config.json"
    ):
        transformer_config(unknown)
    with pytest.raises(UsageError, match="vae/config.json"):
        vae_config(unknown)


def test_a_folders_own_shapes_are_read():
    config = small()
    assert transformer_config(config)["_class_name"] == "FluxTransformer2DModel"
    assert workload_of(config).patch == 2 ** len(vae_config(config)["block_out_channels"])
    assert dataclasses.replace(workload_of(config), rewards=()) == dataclasses.replace(
        workload_of(small("--seed=1")), rewards=()
    )
