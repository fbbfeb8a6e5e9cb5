"""`leapalign doctor`: what it measures is positive and consistent, what it writes is a machine, what it says is true.

No test looks at how fast anything is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leapalign.commands.codes import DONE, USAGE
from leapalign.commands.main import main
from leapalign.config.loading import load_config, preset_names
from leapalign.doctor import examination as doctor
from leapalign.doctor import system
from leapalign.doctor import warnings as doctor_warnings
from leapalign.doctor.examination import checkpoint_bytes, verdict
from leapalign.doctor.findings import Examination, Rates, Verdict
from leapalign.doctor.report import table
from leapalign.doctor.system import Disk, Gpu, Host, cores_obtained, disk_of, host_of, lockable, no_gpu, software
from leapalign.doctor.warnings import warnings
from leapalign.engine.memory.sizes import parse_bytes
from leapalign.engine.planning.rates import CopyRates, HostRates
from leapalign.engine.planning.workload import Machine

GIB = 2**30
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

CARD = Gpu("A card", "8.9", 24 * GIB, 23 * GIB, "16.0 GT/s PCIe x16")
HOST = Host("A processor", 16, 16, None, 15.5, 8, 64 * GIB, None, 60 * GIB, None, "avx2", "")
DISK = Disk(4096 * GIB, 2e9)
COPIES = CopyRates(26e9, 25e9, 22e9, 21e9)
RATES = Rates(1.5e14, COPIES, HostRates(40e9, 30e9))
SOFTWARE = {"torch": "2.13.0", "triton": "3.7.0", "xformers": None}
FITS = Verdict("flux1_dev_24gb", True, "fits: ...", 40.0, 20 * GIB, 50 * GIB, 45 * GIB, 3)


def well(**changes):
    """An examination of a machine that is in order, but for the changes."""
    whole = Examination("cuda:0", CARD, "", HOST, DISK, RATES, 16 * GIB, "", SOFTWARE, (), (FITS,))
    return dataclasses.replace(whole, **changes)


@pytest.fixture
def best(monkeypatch):
    """The host kernels of the examinations above are the best that there are."""
    monkeypatch.setattr(doctor_warnings.host_kernels, "instruction_sets", lambda: ["scalar", "avx2"])
    monkeypatch.setattr(doctor_warnings, "INTERPRETED", False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_the_host_is_consistent():
    found = host_of(0.01)
    assert found.cores and found.total_bytes and found.available_bytes, "Linux tells them"
    assert 1 <= found.usable_cores <= found.cores
    assert 0 < found.cores_obtained <= found.usable_cores
    assert 0 < found.available_bytes <= found.total_bytes
    assert (found.instruction_set is None) == bool(found.missing)
    assert found.threads == torch.get_num_threads()


def test_threads_obtain_no_more_cores_than_there_are_threads(monkeypatch):
    """Other threads of the process may be at work, too."""
    used = iter([0.0, 1e9])
    monkeypatch.setattr(system, "time", SimpleNamespace(perf_counter=time.perf_counter, process_time=used.__next__))
    assert cores_obtained(3, 0.001) == 3


def test_what_was_written_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "WRITTEN", 2**21)
    found = disk_of(tmp_path)
    assert found.write_bytes_per_s and found.write_bytes_per_s > 0 and found.free_bytes > 0 and found.reason == ""
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing_says_why(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(system.tempfile, "TemporaryFile", refuse)
    assert disk_of(tmp_path).reason == "Permission denied"
    monkeypatch.setattr(system, "WRITTEN", 2**70)
    assert disk_of(tmp_path).reason == "it is full" and disk_of(tmp_path).write_bytes_per_s is None


def test_locking_doubles_until_it_is_refused(monkeypatch):
    sizes = []

    class Arena:
        def __init__(self, regions, *, pin):
            assert pin
            sizes.append(regions[""])
            if sizes[-1] > 1000:
                raise RuntimeError("cannot lock so much")

        def close(self):
            pass

    monkeypatch.setattr(system, "HostArena", Arena)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert lockable(10_000, math.inf, least=300) == (600, "cannot lock so much")
    assert sizes == [300, 600, 1200]
    assert lockable(700, math.inf, least=300) == (600, "")
    assert lockable(700, 0.0, least=300) == (300, ""), "no time for the second one"
    assert lockable(100, math.inf, least=300) == (0, "")


@pytest.mark.parametrize(
    ("cuda", "visible", "driver", "expected"),
    [
        (None, None, False, "is built without CUDA; install a build with it"),
        ("13.0", None, False, "no NVIDIA driver is loaded"),
        ("13.0", "", True, "CUDA_VISIBLE_DEVICES = '' leaves torch no GPU; unset it"),
        ("13.0", None, True, "built for CUDA 13.0, no GPU; see nvidia-smi"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, cuda, visible, driver, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(system.platform, "system", lambda: "Linux")
    monkeypatch.setattr(system.Path, "exists", lambda _: driver)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert expected in no_gpu()


def test_software_is_told_there_or_not():
    found = software()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"diffusers", "bitsandbytes", "xformers", "flash-attn", "cuda", "driver"} <= found.keys()


# ---- the machine ---------------------------------------------------------------------------------------------------


def test_the_machine_has_what_was_measured_and_nothing_else():
    assert well().machine == {
        "flops_per_s": 1.5e14, "h2d_bytes_per_s": 22e9, "d2h_bytes_per_s": 21e9, "host_bytes_per_s": 30e9,
    }  # fmt: skip
    assert well(gpu=None).machine == {"host_bytes_per_s": 30e9}, "a CPU's products are no GPU's"
    partly = well(rates=Rates(None, None, RATES.host))
    assert partly.machine == {"host_bytes_per_s": 30e9}
    assert "by default flops_per_s, h2d_bytes_per_s, d2h_bytes_per_s:\n" in table(partly, [])


def test_what_cannot_be_measured_is_left_out_and_told(monkeypatch):
    def locked(*_, **__):
        raise RuntimeError("cannot lock 5 bytes\nmore")

    monkeypatch.setattr(doctor, "matmul_flops_per_s", lambda *_, **__: 1e14)
    monkeypatch.setattr(doctor, "copy_rates", locked)
    monkeypatch.setattr(doctor, "host_rates", lambda **_: RATES.host)
    notes: list[str] = []
    assert doctor._rates(CUDA, 0.1, notes) == Rates(1e14, None, RATES.host)
    assert notes == ["copies: not measured: cannot lock 5 bytes"]


@pytest.mark.parametrize("whole", [True, False])
def test_both_kinds_of_file_are_a_machine(tmp_path, whole):
    rates: dict[str, Any] = {"host_bytes_per_s": 3e9, "flops_per_s": 1e14}
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(well().as_dict() | {"machine": rates} if whole else rates))
    machine = Machine.read(path)
    assert machine == Machine(**rates)
    assert machine.defaults() == ["h2d_bytes_per_s", "d2h_bytes_per_s", "seconds_per_call", "device_base_bytes"]


@pytest.mark.parametrize("text", ['{"machine": [1]}', '{"machine": {"speed": 1}}', '{"machine": {"flops_per_s": 0}}'])
def test_no_such_machine(tmp_path, text):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"machine=.*machine\.json: "):
        Machine.read(path)


# ---- presets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """free(device, host): so many bytes are free."""

    def make(device, host):
        monkeypatch.setattr("leapalign.planning.workload.device_available", lambda place: device)
        for place in ("leapalign.planning.workload", "leapalign.doctor.examination"):
            monkeypatch.setattr(f"{place}.host_available", lambda: host)

    return make


@pytest.fixture
def tiny(monkeypatch):
    """Every preset is the packaged model with a batch that is planned quickly."""
    config = load_config("shapes", ["--train_batch_size=6", "--microbatch=3", "--streamed_mode=paired"])
    monkeypatch.setattr(doctor, "load_config", lambda name: config)


@pytest.mark.usefixtures("tiny")
def test_a_large_preset_without_a_gpu_says_what_gpu(free, monkeypatch):
    monkeypatch.setattr(doctor, "SMALL", 0)
    free(None, 8 * GIB)
    found = verdict("a preset", CPU, {"host_bytes_per_s": 3e9})
    assert not found.fits and found.seconds is None
    vram = found.text.removeprefix("no GPU: needs one with ").removesuffix(" of memory")
    free(parse_bytes(vram) * 1.04, 8 * GIB)  # 3% are left
    assert verdict("a preset", CUDA, {"host_bytes_per_s": 3e9}).fits
    free(None, GIB // 4)
    short = verdict("a preset", CPU, {"host_bytes_per_s": 3e9})
    assert " of memory and " in short.text and "of host memory, of which 248.32MiB are free here" in short.text


@pytest.mark.usefixtures("tiny")
def test_a_gpu_that_is_large_enough_or_not(free):
    rates = well().machine
    free(4 * GIB, 8 * GIB)
    found = verdict("a preset", CUDA, rates)
    assert found.fits and found.seconds and found.device_bytes and found.host_bytes
    assert found.device_bytes <= 4 * GIB and found.host_bytes <= 8 * GIB
    assert found.text.startswith(f"fits: 6 pictures of 32 pixels a step, {found.seconds:.1f} s; device ")
    slower = verdict("a preset", CUDA, rates | {"flops_per_s": rates["flops_per_s"] / 1e6})
    assert slower.seconds and slower.seconds > found.seconds
    free(10 * 2**20, 8 * GIB)
    short = verdict("a preset", CUDA, rates)
    assert not short.fits and short.seconds is None
    assert short.text.startswith("does not fit: vram: 9.70MiB of device memory free on cuda:0 is too little: the step")


@pytest.mark.usefixtures("tiny")
def test_the_packaged_model_fits_a_cpu(free):
    free(None, 8 * GIB)
    found = verdict("shapes", CPU, {"host_bytes_per_s": 3e9})
    assert found.fits and found.seconds is None and "on the CPU" in found.text
    free(None, GIB // 4)
    assert verdict("shapes", CPU, {}).text.startswith("does not fit: ram: ")


def test_one_preset_is_not_trained():
    assert [name for name in preset_names() if not doctor.trained(load_config(name))] == ["sd35_medium_16gb"]


@pytest.mark.usefixtures("tiny")
def test_what_is_not_trained_is_planned_only(free, monkeypatch):
    """And no run fills the disk with its checkpoints."""
    monkeypatch.setattr(doctor, "transformer_config", lambda config: {"_class_name": "SD3Transformer2DModel"})
    free(None, 8 * GIB)
    found = verdict("a preset", CPU, {})
    assert found.fits and found.planned_only and found.checkpoint_bytes is None
    assert found.text.startswith("planned only, `leapalign align` does not train it; fits: 6 pictures of 32 pixels")
    free(None, GIB // 4)
    short = verdict("a preset", CPU, {})
    assert short.text.startswith("planned only, ") and "does not fit: ram: " in short.text


def test_a_checkpoint_has_its_weights_states_and_average():
    """8-bit moments take 2 bytes and 8/256: two float32 numbers a block of 256."""
    assert checkpoint_bytes(load_config("flux1_dev_24gb"), 256) == 256 * (2 + 2) + 8
    assert checkpoint_bytes(load_config("flux1_dev_48gb"), 256) == 256 * (2 + 2 + 2) + 8
    assert checkpoint_bytes(load_config("flux1_dev"), 256) == 256 * (2 + 4 + 2 + 2) + 8
    assert checkpoint_bytes(load_config("shapes"), 256) == 256 * (4 + 8 + 4)


# ---- warnings ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("best")
def test_nothing_to_warn_of():
    assert warnings(well()) == []


def host(**changes):
    return {"host": dataclasses.replace(HOST, **changes)}


@pytest.mark.usefixtures("best")
@pytest.mark.parametrize(
    ("changes", "expected", "way_out"),
    [
        (host(instruction_set=None, missing="no compiler"), "native module is missing (no compiler)", "C++ compiler"),
        (host(instruction_set="scalar"), "host kernels use scalar, avx2 is there", "unset LEAPALIGN_ISA"),
        (host(cores_limit=2.0), "8 threads share 2 cores", "set OMP_NUM_THREADS=2"),
        (host(threads=1), "torch has 1 threads of 16 cores", "set OMP_NUM_THREADS"),
        (host(cores_obtained=4.0), "4.0 of 16 cores were obtained", "end other programs"),
        (host(available_bytes=20 * GIB), "20.00GiB of 64.00GiB of host memory", "end other programs"),
        (host(limit_bytes=200 * GIB, total_bytes=100 * GIB), "60.00GiB of 100.00GiB", "end other programs"),
        ({"gpu": dataclasses.replace(CARD, free_bytes=9 * GIB)}, "9.00GiB of 24.00GiB of device memory", "nvidia-smi"),
        ({"gpu": dataclasses.replace(CARD, capability="7.5")}, "compute capability 7.5", "8.0 or more"),
        ({"software": {"triton": None}}, "Triton is not installed", "pip install triton"),
        ({"lock_error": "error 2"} | host(memlock_bytes=2**23), "16.00GiB of host memory could be locked", "raise"),
        (
            {"rates": Rates(1e14, CopyRates(7e9, 7e9, 6e9, 3.04e9), RATES.host)},
            "3.0 GB/s both ways at once (16.0 GT/s PCIe x16)",
            "16 lanes",
        ),
        ({"disk": Disk(GIB, None, "Read-only file system")}, "(Read-only file system)", "output_dir"),
        ({"disk": Disk(134 * GIB, 2e9)}, "3 checkpoints take 135.00GiB, the disk has 134.00GiB", "lower"),
        ({"disk": Disk(4096 * GIB, 1e8)}, "a checkpoint of 45.00GiB takes 8 minutes at 100 MB/s", "faster"),
    ],
)
def test_each_warning_has_its_way_out(changes, expected, way_out):
    (line,) = warnings(well(**changes))
    assert expected in line and way_out in line.partition(expected)[2] and "\n" not in line


@pytest.mark.usefixtures("best")
def test_the_interpreter_is_warned_of(monkeypatch):
    monkeypatch.setattr(doctor_warnings, "INTERPRETED", True)
    (line,) = warnings(well())
    assert "TRITON_INTERPRET = 1" in line and "unset it" in line


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_table_names_all_of_it():
    expected = [
        "cuda:0: A card",
        "23.00GiB free of 24.00GiB",
        "26.0 GB/s alone, 22.0 both",
        "150 TFLOP/s",
        "16.00GiB locked at once",
        "without xformers",
        "flux1_dev_24gb  fits: ...",
        "warning: something hurts",
    ]
    text = table(well(), ["something hurts"])
    assert [part for part in expected if part not in text] == []
    bare = table(well(gpu=None, no_gpu="no card", locked_bytes=None, rates=Rates(None, None, RATES.host)), [])
    assert "no GPU: no card" in bare and "copies          not measured: no GPU" in bare


@pytest.fixture
def quick(monkeypatch, tmp_path, no_card, tiny):
    """The command measures next to nothing and plans one preset."""
    monkeypatch.setattr("leapalign.engine.planning.rates.COPIED", 2**20)
    monkeypatch.setattr("leapalign.engine.planning.rates.UPDATED", (2**18, 2**18))
    monkeypatch.setattr(system, "WRITTEN", 2**21)
    monkeypatch.setattr(doctor, "preset_names", lambda: ["shapes"])
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("quick")
def test_what_doctor_writes_plan_reads(tmp_path, capsys):
    assert main(["doctor", "--seconds", "0.01", "--json", "--output", "machine.json"]) == DONE
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err.count("\n") == 1 and found == json.loads((tmp_path / "machine.json").read_text())
    assert found["date"] == datetime.now(UTC).date().isoformat()
    assert found["command"] == "leapalign doctor --seconds 0.01"
    assert found["gpu"] is None and found["no_gpu"] and found["rates"]["copies"] is None
    assert found["machine"] == {"host_bytes_per_s": found["rates"]["host"]["in_place"]}
    assert found["rates"]["matmul_flops_per_s"] > 0 and found["rates"]["host"]["copy"] > 0
    (preset,) = found["presets"]
    assert preset["name"] == "shapes" and preset["fits"] and not preset["planned_only"]

    words = ["plan", "shapes", "--train_batch_size", "6", "--machine", "machine.json"]
    assert main([*words, "--json"]) == DONE
    plan = json.loads(capsys.readouterr().out)
    assert plan["machine"]["host_bytes_per_s"] == found["machine"]["host_bytes_per_s"]
    assert "flops_per_s" in plan["default_rates"] and "host_bytes_per_s" not in plan["default_rates"]
    assert main(words) == DONE
    assert "seconds: with the given host_bytes_per_s; by default flops_per_s, h2d" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_without_a_gpu_the_table_says_so(capsys):
    assert main(["doctor", "--seconds=0.01"]) == DONE
    out = capsys.readouterr().out
    assert out.startswith("device          no GPU: ") and "shapes  fits: 6 pictures" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seconds", "0"], "--seconds 0.0: give more than 0 and at most 60"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--seconds", "long"], "--seconds"),
        (["--output", "none/x.json"], "--output 'none/x.json': give a file NAME.json in a folder that exists"),
        (["--output", "x.txt"], "--output 'x.txt'"),
        (["shapes"], "unrecognized arguments: shapes"),
        (["--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_mistakes_take_one_line(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *words]) == USAGE
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and expected in err
    assert list(tmp_path.iterdir()) == []


def test_help(capsys):
    assert main(["doctor", "--help"]) == DONE
    out = capsys.readouterr().out
    assert all(f"--{option}" in out for option in ("json", "output", "seconds")) and "CONFIG" not in out
