"""`leapalign plan`: the presets plan within their names, and what is printed is the plan."""

from __future__ import annotations

import json

import pytest

from leapalign.commands.codes import DONE, USAGE
from leapalign.commands.main import main
from leapalign.config.loading import PRESETS, load_config
from leapalign.planning.report import plan_command

GIB = 2**30
SMALL = ["shapes", "--executor=streamed", "--train_batch_size", "6", "--microbatch=3", "--streamed_mode=paired"]
PROMISES = [
    ("flux1_dev_24gb", 24, 64, (512, 720, 1024)),
    ("flux1_dev_48gb", 48, 128, (512, 720, 1024)),
    ("flux1_dev_12gb", 12, 64, (512, 720)),
    ("flux1_dev_8gb", 8, 64, (512,)),
    ("sd35_medium_16gb", 16, 32, (720,)),
]


@pytest.mark.parametrize(
    ("preset", "vram", "ram", "resolution"),
    [(name, vram, ram, resolution) for name, vram, ram, resolutions in PROMISES for resolution in resolutions],
)
def test_a_preset_plans_within_its_name(preset, vram, ram, resolution):
    config = load_config(preset, [f"--resolution={resolution}", f"--vram={vram}GiB", f"--ram={ram}GiB"])
    found = plan_command(config)
    assert found["peak_device_bytes"] <= vram * GIB
    assert found["peak_host_bytes"] <= ram * GIB
    assert found["settings"]["parameters"] == (2_243_171_520 if "sd35" in preset else 11_901_408_320)
    assert [phase["name"] for phase in found["phases"]][:3] == ["hoist", "rollout", "reward"]


def test_what_a_preset_says_is_what_is_tested():
    """Each preset's comment names the card and the host that it is planned for."""
    for preset, vram, ram, _ in PROMISES:
        first = (PRESETS / f"{preset}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert f"{vram} GiB" in first and f"{ram} GiB" in first


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
        (["--vram", "10MiB"], "vram = 10MiB is too little: the step needs"),
        (["--ram", "1GiB"], "ram = 1GiB is too little: the step needs"),
        (["--vram", "plenty"], "give a size such as 24GiB"),
        (["--machine", "none.json"], "machine=none.json"),
        (["--pretrained_model_name_or_path", "nowhere"], "pretrained_model_name_or_path = 'nowhere' does not exist"),
        (["--vrma", "3GiB"], "--vram"),
    ],
)
def test_mistakes_take_one_line(words, expected, capsys):
    code, out, error = plan(capsys, *SMALL, *words)
    assert code == USAGE and out == ""
    assert error.count("\n") == 1 and expected in error


def test_only_a_streamed_run_has_a_plan(capsys):
    code, out, error = plan(capsys, "shapes", "--executor", "autograd")
    assert code == USAGE and out == ""
    assert "executor = autograd has no memory plan" in error and "use executor streamed" in error


def test_help_names_the_limits(capsys):
    code, out, _ = plan(capsys, "--help")
    assert code == DONE
    assert "--vram" in out and "--ram" in out and "--machine" in out
