"""`leapalign plan`: the presets plan within their names, and what is printed is the plan."""

from __future__ import annotations

import json

import pytest

from leapalign.cli import DONE, USAGE, main
from leapalign.config import load_config
from leapalign.engine.workload import Budget
from leapalign.plan_command import plan_command, reward_loads, vae_config

GIB = 2**30
SMALL = ["shapes", "--executor=streamed", "--train_batch_size", "6", "--microbatch=3", "--streamed_mode=paired"]
PROMISES = [
    ("flux1_dev_24gb", 24, 64, (512, 720, 1024)),
    ("flux1_dev_48gb", 48, 128, (720,)),
    ("flux1_dev_12gb", 12, 64, (512, 720)),
    ("flux1_dev_8gb", 8, 64, (512,)),
    ("sd35_medium_16gb", 16, 32, (720,)),
]


@pytest.mark.parametrize(
    ("preset", "vram", "ram", "resolution"),
    [(name, vram, ram, resolution) for name, vram, ram, resolutions in PROMISES for resolution in resolutions],
)
def test_a_preset_plans_within_its_name(preset, vram, ram, resolution):
    config = load_config(preset, [f"--resolution={resolution}"])
    found = plan_command(config, Budget(f"{vram}GiB", f"{ram}GiB"))
    assert found["peak_device_bytes"] <= vram * GIB
    assert found["peak_host_bytes"] <= ram * GIB
    assert found["settings"]["parameters"] == (2_243_171_520 if "sd35" in preset else 11_901_408_320)
    assert [phase["name"] for phase in found["phases"]][:3] == ["hoist", "rollout", "reward"]


def test_the_rewards_memory():
    """PickScore's and the VAE's weights in float32; recomputing the VAE's blocks halves the rest."""
    config = load_config("flux1_dev_24gb", ["--resolution=512"])
    whole, recomputed = reward_loads(config, vae_config(config))
    assert whole.weight_bytes == recomputed.weight_bytes == 4 * (986_109_441 + 83_819_683)
    assert 5 * GIB < whole.activation_bytes < 8 * GIB
    assert recomputed.activation_bytes < 0.6 * whole.activation_bytes
    assert whole.flops < recomputed.flops < 1.5 * whole.flops


def plan(capsys, *words):
    code = main(["plan", *words])
    out, error = capsys.readouterr()
    return code, out, error


def test_json(capsys):
    code, out, _ = plan(capsys, *SMALL, "--vram", "4GiB", "--json")
    assert code == DONE
    found = json.loads(out)
    assert {"mode", "microbatch", "peak_device_bytes", "peak_host_bytes", "phases", "settings"} <= found.keys()
    phase = {"name", "device_bytes", "host_bytes", "h2d_bytes", "d2h_bytes", "flops", "seconds"}
    assert all(phase <= each.keys() for each in found["phases"])
    assert found["peak_device_bytes"] == max(each["device_bytes"] for each in found["phases"]) <= 4 * GIB
    assert found["settings"]["vram"] == 4 * GIB


def test_table_overrides_and_machine(capsys, tmp_path):
    machine = tmp_path / "machine.json"
    machine.write_text('{"flops_per_s": 1e12}')
    code, quick, _ = plan(capsys, *SMALL)
    assert code == DONE
    assert "6 pictures of 32 pixels" in quick and "weight gradients" in quick and "microbatch        3" in quick
    _, slow, _ = plan(capsys, *SMALL, "--machine", str(machine))
    seconds = [float(text.partition("\nstep")[2].split("\n")[0].split()[-1]) for text in (quick, slow)]
    assert seconds[0] <= seconds[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--vram", "10MiB"], "vram=10.00MiB is too little"),
        (["--ram", "1GiB"], "ram=1.00GiB is too little"),
        (["--vram", "plenty"], "vram=plenty: give a size such as 24GiB"),
        (["--machine", "none.json"], "machine=none.json"),
        (["--pretrained_model_name_or_path", "someone/something"], "its shapes are not known"),
        (["--vrma", "3GiB"], "--vram"),
    ],
)
def test_mistakes_take_one_line(words, expected, capsys):
    code, out, error = plan(capsys, *SMALL, *words)
    assert code == USAGE and out == ""
    assert error.count("\n") == 1 and expected in error
