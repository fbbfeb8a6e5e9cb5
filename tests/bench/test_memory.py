"""What the simulation counts is right, and the streamed engine keeps its promises on the real model's shapes."""

from __future__ import annotations

import dataclasses
import json
import weakref

import pytest
import torch
from torch.nn import functional

from bench import record
from bench.__main__ import main
from bench.memory.devices import HostAndDevice
from bench.memory.simulate import Workload, simulate
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.counting import DeviceCounter, gpu_operators
from leapalign.families.flux import FLUX1_DEV

GIB = 2**30
TINY = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": True,
    "in_channels": 16,
    "joint_attention_dim": 32,
    "num_attention_heads": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "patch_size": 1,
    "pooled_projection_dim": 24,
}
TINY_WORKLOAD = Workload(TINY, batch=2, resolution=64, steps=2, text_tokens=8)


@pytest.fixture
def counter():
    """A counter that watches a simulated machine."""
    machine, counter = HostAndDevice(), DeviceCounter()
    with machine, gpu_operators(), machine.observed(counter.observe):
        yield counter


def on_gpu(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


# ---- counting ------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_and_while_it_lives(counter):
    tensor = on_gpu(1000, 3)
    assert counter.current == 6144  # 6000 bytes, in units of 512
    view = tensor[10:, 1:]
    view.add_(1)
    assert counter.current == 6144
    del tensor
    assert counter.current == 6144
    del view
    assert (counter.current, counter.peak) == (0, 6144)


def test_what_a_graph_saves_counts_until_it_is_freed(counter):
    leaf = on_gpu(512, 512).requires_grad_()
    middle = leaf * 2
    size = 512 * 512 * 2
    loss = (middle * middle).sum()
    del middle
    assert counter.current == 2 * size + 512  # leaf, saved factor, loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert counter.current == 2 * size + 512  # leaf, gradient, loss: the factor went with its graph
    assert counter.peak >= 3 * size
    del gradient, leaf, loss
    assert counter.current == 0


def test_the_storages_python_object_lives_as_long_as_the_storage(counter):
    """The counter's weak references depend on it, even if only C++ holds the tensor."""
    value = on_gpu(8).requires_grad_() * 1
    alive = weakref.ref(value.untyped_storage())
    squared = value * value
    del value
    assert alive() is not None
    del squared
    assert alive() is None


def test_phases_know_their_peaks_and_flops(counter):
    kept = on_gpu(256)
    with counter.phase("outer"):
        a = on_gpu(64, 64)
        with counter.phase("inner"):
            b = a @ a
            del b
        del a
    with counter.phase("after"):
        del kept
    phases = counter.phases
    assert list(phases) == ["outer", "inner", "after"]
    assert [phase.counted_bytes for phase in phases.values()] == [512 + 2 * 8192, 512 + 2 * 8192, 512]
    assert [phase.flops for phase in phases.values()] == [2 * 64**3, 2 * 64**3, 0]


def test_the_largest_holdings_at_the_peak(counter):
    weights = [on_gpu(1024) for _ in range(3)]
    big = on_gpu(2048, dtype=torch.float32)
    del big
    small = on_gpu(1)
    first, second = counter.holdings()
    assert (first.shape, first.dtype, first.count, first.counted_bytes) == ((2048,), "float32", 1, 8192)
    assert (second.shape, second.dtype, second.count, second.counted_bytes) == ((1024,), "bfloat16", 3, 6144)
    del weights, small


def test_flops_of_a_linear_layer(counter):
    weight, bias, x = on_gpu(48, 32).requires_grad_(), on_gpu(48).requires_grad_(), on_gpu(2, 5, 32).requires_grad_()
    y = functional.linear(x, weight, bias)
    assert counter.flops == 2 * 10 * 32 * 48
    torch.autograd.grad(y, [x, weight, bias], torch.empty_like(y))
    assert counter.flops == 3 * 2 * 10 * 32 * 48


def test_attention_is_flash_attention(counter):
    """No matrix of scores; forward 4 B H S^2 D, backward 2.5 times that with the recomputed scores."""
    batch, heads, tokens, width = 1, 3, 4096, 64
    q, k, v = (on_gpu(batch, heads, tokens, width).requires_grad_() for _ in range(3))
    y = functional.scaled_dot_product_attention(q, k, v)
    forward = 4 * batch * heads * tokens**2 * width
    assert counter.flops == forward
    torch.autograd.grad(y, [q, k, v], torch.empty_like(y))
    assert counter.flops == forward * 7 // 2
    assert counter.peak < 12 * y.nbytes < batch * heads * tokens**2 * 2


def test_the_fused_norm_saves_one_number_a_row(counter):
    weight, x = on_gpu(128).requires_grad_(), on_gpu(1024, 128).requires_grad_()
    before = counter.current
    y = functional.rms_norm(x, [128], weight, 1e-6)
    assert counter.current - before == y.nbytes + 1024 * 4
    found = torch.autograd.grad(y, [x, weight], torch.empty_like(y))
    assert [gradient.shape for gradient in found] == [x.shape, weight.shape]


def test_host_and_device_do_not_mix(counter):
    host, device = torch.empty(2**40), on_gpu(4)  # 4 TiB: the host is fake
    assert host.device.type == "cpu"
    assert host[:4].to("meta").device.type == "meta" and device.to("cpu").device.type == "cpu"
    device.copy_(host[:4])
    host[:4].copy_(device)
    with pytest.raises(AssertionError, match="takes tensors of"):
        device + host[:4]
    assert counter.peak <= 3 * 512


def test_flops_of_one_forward_of_the_real_model():
    """All linear layers and attentions of FLUX.1-dev, from its shapes: 21.5 and 74.4 TFLOP."""
    d, text = 24 * 128, 512
    for resolution in (512, 1024):
        image = (resolution // 16) ** 2
        tokens = image + text
        block = 2 * tokens * 12 * d * d + 4 * tokens**2 * d  # four projections and an MLP of width 4 d, fused or not
        modulation = 2 * d * d * (19 * 12 + 38 * 3 + 2)
        embedders = 2 * (64 * image + 4096 * text + 2 * (256 + d) + 768 + d) * d
        expected = 57 * block + modulation + embedders + 2 * d * 64 * image
        # One double and one single block: the others only repeat them.
        small = simulate(Workload({**FLUX1_DEV, "num_layers": 1, "num_single_layers": 1}, 1, resolution, 2))
        assert small.forward_flops == expected - 55 * block - 2 * d * d * (18 * 12 + 37 * 3)


def test_remembered_shapes_are_the_operators_own(monkeypatch):
    """Results made from memory change nothing that is counted."""
    workload = dataclasses.replace(TINY_WORKLOAD, batch=1, resolution=32)
    remembered = simulate(workload)
    monkeypatch.setattr(HostAndDevice, "_on_device", lambda self, func, args, kwargs, *_: func(*args, **kwargs))
    assert simulate(workload) == remembered


# ---- the streamed engine -------------------------------------------------------------------------------------------


def test_all_blocks_of_the_real_model_resident():
    """Everything but the modulation weights on the card; 33.5 forwards an image, of which 25 are the rollout's.

    The larger resolution, which may take 21.5 GiB, stays below the 20 GiB that 512 pixels may take.
    """
    found = simulate(Workload(batch=1, resolution=1024, steps=2, plan=MemoryPlan(resident="all")))
    assert found.parameters == 11_901_408_320
    assert 16.1 * GIB < found.counted_peak_bytes <= 20 * GIB
    assert found.counted_peak_bytes == max(phase.counted_bytes for phase in found.phases.values())
    assert found.forwards_per_image + 23 <= 33.5


@pytest.mark.parametrize(("resolution", "limit"), [(512, 3), (1024, 4)])  # GiB, with the optimizer on the host
@pytest.mark.parametrize(
    ("mode", "kept", "forwards"), [("paired", True, 33.5), ("paired", False, 36.5), ("held", True, 33.2)]
)
def test_everything_streamed(mode, kept, forwards, resolution, limit):
    """The real blocks, few of them: the next test shows that their number does not matter."""
    found = simulate(few_blocks(2, 2, resolution=resolution, mode=mode, keep_block_inputs=kept))
    assert found.counted_peak_bytes <= limit * GIB
    assert found.forwards_per_image + 23 <= forwards


def test_peak_is_flat_in_batch_and_depth():
    """Within 3%, extrapolated to 64 images and to 57 blocks."""
    base = simulate(few_blocks(1, 1)).counted_peak_bytes
    batch = simulate(few_blocks(1, 1, batch=5)).counted_peak_bytes
    depth = simulate(few_blocks(2, 4)).counted_peak_bytes
    assert 0 <= (batch - base) / 4 * 63 <= 0.03 * base
    assert 0 <= (depth - base) / 4 * 55 <= 0.03 * base


def few_blocks(double, single, **settings):
    architecture = {**FLUX1_DEV, "num_layers": double, "num_single_layers": single}
    return dataclasses.replace(Workload(architecture, batch=1, steps=2), **settings)


def test_every_phase_is_counted():
    """The rollout costs a forward a step, the first leg alone recomputation and input gradient, both together 3 each.

    Attention's backward recomputes the scores, half a forward of attention more; stem and head are not recomputed.
    """
    found = simulate(dataclasses.replace(TINY_WORKLOAD, plan=MemoryPlan(microbatch=2)))
    forwards = {name: phase.flops / 2 / found.forward_flops for name, phase in found.phases.items()}
    assert list(forwards) == ["model", "hoist", "rollout", "input gradient", "weight gradients"]
    assert forwards["rollout"] + forwards["hoist"] == pytest.approx(2, abs=0.02)
    assert forwards["input gradient"] == pytest.approx(2, abs=0.15)
    assert forwards["weight gradients"] == pytest.approx(6, abs=0.3)
    assert sum(forwards.values()) == pytest.approx(found.forwards_per_image)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """A transformer's config.json as diffusers writes it."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "out_channels": None, **TINY}))
    return path


def command(config, *arguments):
    sizes = ["--batch", "2", "--resolution", "32", "--steps", "2"]
    return main(["memory", "--simulate", "flux1_dev", "--model-config", str(config), *sizes, *arguments])


def test_json(config, capsys):
    assert command(config, "--resident", "all", "--mode", "held", "--recompute", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {"settings", "counted_peak_bytes", "phases", "forwards_per_image"} <= result.keys()
    assert [phase["name"] for phase in result["phases"]] == [
        "model",
        "hoist",
        "rollout",
        "first leg",
        "weight gradients",
    ]
    assert all(0 < phase["counted_bytes"] <= result["counted_peak_bytes"] for phase in result["phases"])
    assert result["settings"]["blocks"] == [2, 2]


def test_table_and_result_file(config, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert command(config, "--blocks", "1,2", "--output", "memory-tiny") == 0
    written = json.loads((tmp_path / "memory-tiny.json").read_text())
    assert written["settings"]["blocks"] == [1, 2]
    assert "--blocks 1,2" in written["command"] and "--output" not in written["command"]
    assert "weight gradients" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--blocks", "3"],
        ["--resolution", "500"],
        ["--batch", "0"],
        ["--steps", "1"],
        ["--microbatch", "0"],
        ["--frobnicate"],
        ["--model-config", "nowhere.json"],
    ],
)
def test_wrong_settings_are_told_in_one_line(config, wrong, capsys):
    assert command(config, *wrong) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert wrong[0].lstrip("-") in error or wrong[-1] in error


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"_class_name": "SD3Transformer2DModel"}'])
def test_a_config_of_something_else(config, text, capsys):
    config.write_text(text)
    assert command(config) == 2
    assert "model-config" in capsys.readouterr().err
