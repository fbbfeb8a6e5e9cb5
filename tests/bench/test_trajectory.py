"""Memory against trajectory length: what is compared computes the same gradient, and the measurements say so much."""

from __future__ import annotations

import copy
import gc
import json
from functools import partial
from typing import Any

import pytest
import torch

from bench import record
from bench.__main__ import main
from bench.memory import trajectory, trajectory_measured
from bench.memory.growth import Line, fit, spread
from bench.memory.live_tensors import LiveTensors
from bench.memory.one_graph import backpropagate_leaps, backpropagate_steps, checkpoint_blocks
from bench.memory.simulate import Workload
from bench.memory.trajectory_measured import allocated, live_bytes
from bench.memory.trajectory_points import ENGINE, METHODS, count, exists
from leapalign.engine.memory.arena import HostArena
from leapalign.engine.model import StreamedModel
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.gradients import GradientDictionary
from leapalign.executors.autograd import surrogate_gradients
from leapalign.executors.streamed import streamed_rollout, streamed_vjps
from leapalign.families.sd3 import SD35_MEDIUM
from leapalign.method.last_steps import last_steps
from leapalign.method.leapalign import LeapAlign, leapalign2
from leapalign.method.trajectory import rollout
from tests.bench.test_memory import TINY

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0], dtype=torch.float64)
BATCH = 2
MIB = 2**20


# ---- one gradient --------------------------------------------------------------------------------------------------


@pytest.fixture
def given(make_transformer, make_inputs, float64_throughout):
    """(a tiny transformer, conditioning, noise, g), all float64."""
    noise, conditioning = make_inputs("flux-guidance", BATCH, torch.float64)
    g = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return make_transformer("flux-guidance", torch.float64), conditioning, noise, g


def grads(transformer):
    """{name: gradient} of a graph's backward pass: zero where a parameter is not used."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in transformer.named_parameters()
    }


@pytest.mark.parametrize("mode", ["paired", "held"])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_the_engine_differentiates_the_last_steps_exactly(length, mode, given, worst_error):
    """Every parameter within 1e-10 of autograd through so many real Euler steps; 4 are the whole trajectory."""
    transformer, conditioning, noise, g = given
    plain = copy.deepcopy(transformer)
    latents = rollout(transformer, conditioning, noise, SIGMAS).latents[-1 - length]
    backpropagate_steps(plain, conditioning, latents, SIGMAS[-1 - length :], g)
    model, sink = StreamedModel(transformer, MemoryPlan(), device="cpu"), GradientDictionary()
    steps = [list(range(4 - length, 4))] * BATCH
    rolled = streamed_rollout(model, conditioning, noise, SIGMAS, steps, keep_block_inputs=mode == "paired")
    streamed_vjps(model, conditioning, rolled, last_steps(rolled.trajectory, length), g, mode=mode, sink=sink)
    rolled.drop()
    model.close()
    error, name = worst_error(sink.grads, grads(plain))
    assert error <= 1, f"{name}: {error:.2g} times the tolerance"


def test_checkpoints_change_nothing(given, worst_error):
    transformer, conditioning, noise, g = given
    found = []
    for blocks, steps in ((False, False), (True, False), (True, True)):
        plain = copy.deepcopy(transformer)
        if blocks:
            checkpoint_blocks(plain)
        backpropagate_steps(plain, conditioning, noise, SIGMAS, g, checkpoint_steps=steps)
        found.append(grads(plain))
    assert all(worst_error(other, found[0])[0] <= 1 for other in found[1:])
    assert any(gradient.any() for gradient in found[0].values())


def test_two_leaps_in_one_graph_are_leapalign(given, worst_error):
    """Against the decoupled executor's legs at the pair (k, j) = (1, 2)."""
    transformer, conditioning, noise, g = given
    pairs = torch.tensor([[1, 2]] * BATCH)
    trajectory = rollout(transformer, conditioning, noise, SIGMAS, keep=pairs)
    surrogate = leapalign2(trajectory, pairs, LeapAlign(alpha=0.3))
    expected = surrogate_gradients(transformer, conditioning, trajectory, surrogate, g)
    latents, sigmas = trajectory.latents[[1, 2, 4]], SIGMAS[[1, 2, 4]]
    backpropagate_leaps(transformer, conditioning, latents, sigmas, g, alpha=0.3)
    assert worst_error(grads(transformer), expected)[0] <= 1


@pytest.mark.parametrize("length", [0, 5])
def test_more_steps_than_there_are(length, given):
    transformer, conditioning, noise, _ = given
    with pytest.raises(ValueError, match=f"length={length} must be from 1 to 4"):
        last_steps(rollout(transformer, conditioning, noise, SIGMAS), length)


# ---- counting real tensors -----------------------------------------------------------------------------------------


def test_live_bytes_of_device_and_host():
    live, arena = LiveTensors(), HostArena({"a": 8192}, pin=False)
    with live:
        tensor = torch.empty(1000)
        view = tensor[10:].add_(1)
        assert (live.device.current, live.host.current) == (4000, 0)
        arena["a"].fill_(1)
        assert (live.device.current, live.host.current) == (4000, 8192)
        with live.on_host():
            other = torch.empty(5)
            with live.on_device():
                third = torch.empty(7)
        assert (live.device.current, live.host.current) == (4028, 8212)
        live.to_host([tensor])
        assert (live.device.current, live.host.current) == (28, 12212)
        del tensor, view, other, third
        gc.collect()
        assert (live.device.current, live.device.peak, live.host.peak) == (0, 4028, 12212)


def test_what_a_graph_keeps_is_live():
    live = LiveTensors()
    with live:
        leaf = torch.ones(256, requires_grad=True)
        loss = (leaf * 2).exp().sum()  # keeps the result of exp, not that of the product
        assert live.device.current == 2 * 1024 + 4
        loss.backward()
        assert live.device.current == 2 * 1024 + 4  # the leaf and its gradient


# ---- the curves ----------------------------------------------------------------------------------------------------


def measured(lengths):
    """The curves of the packaged model, in this process, of rollouts of 3 steps."""
    shapes = trajectory.MODELS["shapes"]
    base = shapes.workload(architecture=shapes.architecture(), batch=1, resolution=shapes.resolution, steps=3)
    return trajectory.trajectory(trajectory.Axes([base], [base], [base]), lengths, live_bytes, progress=lambda _: None)


def test_full_trajectory_grows_and_the_engine_is_flat():
    """Measured. What a graph keeps of a step is the same for each step, so the third one adds what the second added;
    1% covers the latents between them. LeapAlign in one graph has length 2 alone.
    """
    result = measured([1, 2, 3])
    peaks = result["peak_bytes"]
    first, second, third = peaks["full_autograd"]
    assert third - second == pytest.approx(second - first, rel=0.01)
    assert third - second > 10 * MIB
    assert result["growth"]["bytes_per_step"]["full_autograd"]["r_squared"] > 0.999
    assert 0 < peaks["full_checkpointed"][2] - peaks["full_checkpointed"][1] < (third - second) / 5
    assert [value is None for value in peaks["leapalign_one_graph"]] == [True, False, True]
    for method in ENGINE:
        assert spread(peaks[method]) <= 0.03
        assert max(peaks[method]) < first
    host = result["host_bytes"]
    assert host["engine_paired"][2] > host["engine_paired"][1]  # block inputs wait there
    assert host["engine_held"][2] == pytest.approx(host["engine_held"][1], rel=0.03)
    assert not any(host["full_autograd"])


def test_points_on_a_gpu(monkeypatch):
    """Its steps, on the CPU in the GPU's place: gradients are where each method leaves them, and memory that does not
    suffice is no point. SD3's kind has a buffer besides.
    """
    steps: list[trajectory_measured._Step] = []
    run = trajectory_measured._Step.run

    def remembered(step, live=None):
        steps.append(step)
        run(step, live)

    monkeypatch.setattr(trajectory_measured._Step, "run", remembered)
    for name, value in {"empty_cache": None, "reset_peak_memory_stats": None, "synchronize": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 110)
    for method in ("full_checkpointed", "leapalign_one_graph", "engine_paired", "engine_held"):
        assert allocated(tiny_workload(), method, torch.device("cpu")) == {"peak_bytes": 100}
    grads = [[p.grad is not None for p in step.transformer.parameters()] for step in steps]
    small: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
    }
    small |= {"joint_attention_dim": 16, "pooled_projection_dim": 16, "dual_attention_layers": (0,), "sample_size": 8}
    sd3 = tiny_workload(architecture={**SD35_MEDIUM, **small, "pos_embed_max_size": 8})
    assert allocated(sd3, "engine_paired", torch.device("cpu")) == {"peak_bytes": 100}
    assert all(grads[0]) and all(grads[1]) and not any(grads[2] + grads[3])  # the engine's went to its sink

    def too_large(step, live=None):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trajectory_measured._Step, "run", too_large)
    lines: list[str] = []
    base = tiny_workload()
    axes = trajectory.Axes([base], [base], [base])
    point = partial(allocated, device=torch.device("cpu"))
    result = trajectory.trajectory(axes, [1, 2], point, progress=lines.append)
    assert result["peak_bytes"]["engine_held"] == [None, None]
    assert result["growth"]["spread_over_lengths"] == {} and "engine_held" in trajectory.table(
        {"model": "m", "how": "h", **result}
    )
    assert lines[0].endswith("out of memory")


def tiny_workload(**settings):
    return Workload(**{"architecture": TINY, "batch": 1, "resolution": 64, "steps": 4, "text_tokens": 8, **settings})


def test_counted_graphs_grow_in_a_line():
    """From the third step on every step keeps what the one before kept; less where blocks have checkpoints."""
    growth = []
    for method in ("full_autograd", "full_checkpointed", "full_step_checkpointed"):
        peaks = [count(tiny_workload(legs=legs, steps=5), method)["peak_bytes"] for legs in (3, 4, 5)]
        assert peaks[2] - peaks[1] == peaks[1] - peaks[0]
        growth.append(peaks[2] - peaks[1])
    assert growth[0] > 5 * growth[1] and growth[1] > 2 * growth[2] > 0


def test_axes_and_growth_laws():
    """Of a method whose memory is known: the laws give its coefficients, and points where axes meet are found once."""
    asked = []

    def point(workload, method):
        asked.append((method, workload.legs, workload.batch, workload.resolution, trajectory._blocks(workload)))
        tokens = (workload.resolution // 16) ** 2
        return {"peak_bytes": 7 * workload.legs + 100 * workload.batch + 3 * tokens + 50 * trajectory._blocks(workload)}

    base = tiny_workload()
    axes = trajectory.Axes(
        [base, tiny_workload(batch=3), tiny_workload(batch=4)],
        [base, tiny_workload(resolution=96)],
        [base, tiny_workload(architecture={**TINY, "num_single_layers": 6})],
    )
    lines: list[str] = []
    result = trajectory.trajectory(axes, [1, 2, 4], point, progress=lines.append)
    assert len(asked) == len(set(asked)) == len(lines)
    assert result["lengths"] == [1, 2, 4] and list(result["peak_bytes"]) == list(METHODS)
    at = {name: axis["values"] for name, axis in result["axes"].items()}
    assert at == {"batch": [1, 3, 4], "resolution": [64, 96], "blocks": [4, 8]}
    slopes = {"step": 7, "image": 100, "token": 3, "block": 50}
    for unit, slope in slopes.items():
        laws = result["growth"][f"bytes_per_{unit}"]
        assert laws["engine_held"]["slope"] == pytest.approx(slope)
    assert result["growth"]["bytes_per_image"]["engine_held"]["r_squared"] == pytest.approx(1)
    assert result["growth"]["bytes_per_step"]["leapalign_one_graph"] is None
    assert result["peak_bytes"]["leapalign_one_graph"][::2] == [None, None]
    assert result["growth"]["spread_over_lengths"]["engine_paired"] > 0
    assert "MiB per token" in trajectory.table({"model": "tiny", "how": "counted", **result})


@pytest.mark.parametrize(("method", "forwards"), [
    ("full_autograd", 2 + 2 * 3), ("full_checkpointed", 2 + 2 * 4), ("full_step_checkpointed", 2 + 2 * 5),
    ("leapalign_one_graph", 4 + 2 * 4), ("engine_paired", 4 + 2 + 2 * 3), ("engine_held", 4 + 2 * 4),
])  # fmt: skip
def test_forwards_an_image(method, forwards):
    """Rollout, and for each differentiated step its forward, its backward of two, and what is computed again.

    Attention's backward recomputes the scores; stem and head are not computed again: within 3%.
    """
    found = count(tiny_workload(legs=2), method)
    assert found["forwards_per_image"] == pytest.approx(forwards, rel=0.03)


def test_leapalign_has_two_steps():
    assert [length for length in range(5) if exists("leapalign_one_graph", length)] == [2]


def test_lines():
    line = fit([1, 2, 4], [3, 5, 9])
    assert line == Line(2, 1, 1)
    assert fit([1, 2], [3, 5]) == Line(2, 1, None)  # two points are always on a line
    assert fit([1, 2, 3], [4, 4, 4]) == Line(0, 4, None)
    assert fit([2, 2], [1, 3]) is None
    humped = fit([1, 2, 3], [0, 3, 0])
    assert humped is not None and (humped.slope, humped.r_squared) == (0, 0)
    assert spread([4, 5, 4.5]) == 0.25


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_prints(capsys, tmp_path, monkeypatch):
    """One point of each method measured in a process of its own."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    arguments = ["--trajectory", "2", "--model", "shapes", "--resolution", "32", "--steps", "2"]
    arguments += ["--resident", "none", "--json"]
    assert main(["memory", *arguments, "--output", "trajectory-tiny"]) == 0
    out, error = capsys.readouterr()
    printed, written = json.loads(out), json.loads((tmp_path / "trajectory-tiny.json").read_text())
    assert printed.items() <= written.items()
    assert written["command"] == f"python -m bench memory {' '.join(arguments)}"
    assert {"date", "machine", "versions", "lengths", "peak_bytes", "growth", "settings", "included"} <= written.keys()
    assert written["how"] == "measured" and set(written["peak_bytes"]) == set(METHODS)
    for method in METHODS:
        (peak,), (resident,) = written["peak_bytes"][method], written["resident_bytes"][method]
        assert min(peak, resident) > MIB
    assert error.count("pixels") == len(METHODS)
    assert "engine_held" in trajectory.table(written)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--trajectory", "2,1"],
        ["--trajectory", "0"],
        ["--trajectory", "1,x"],
        ["--trajectory", "26"],
        ["--blocks", "3"],
        ["--blocks", "0,1"],
        ["--batch", "0"],
        ["--resolution", "36"],
        ["--mode", "held"],
        ["--vram", "24GiB"],
        ["--microbatch", "0"],
        ["--frobnicate"],
    ],
)
def test_wrong_settings_are_told_in_one_line(wrong, capsys):
    assert main(["memory", "--trajectory", "1,2", *wrong]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert wrong[0].lstrip("-") in error


def test_without_a_gpu_nothing_is_measured_on_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["memory", "--trajectory", "1,2", "--model", "flux1_dev", "--gpu"]) == 2
    assert "gpu: torch sees no CUDA GPU; without --gpu flux1_dev is counted on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--gpu"], ["--batch", "1,2"], ["--model", "shapes"], ["--blocks", "1,1", "2,2"]])
def test_a_single_step_takes_no_lists(wrong, capsys):
    assert main(["memory", "--simulate", "flux1_dev", *wrong]) == 2
    assert wrong[0].lstrip("-") in capsys.readouterr().err
