"""Tables and figures of results that other machines write, from small made-up files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.report import command as report
from bench.report import figures
from bench.report.sections import SECTIONS

HEAD: dict[str, Any] = {
    "date": "2026-01-02",
    "machine": {"cpu": "A CPU", "threads": 2, "gpu": None},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
}
GPU = {**HEAD, "machine": {"cpu": "A CPU", "threads": 2, "gpu": "A GPU"}}
LAW = {"slope": 2.0**20, "intercept": 0.0, "r_squared": 0.99999}

TRAJECTORY = {
    **HEAD,
    "command": "python -m bench memory --simulate flux1_dev",  # of options that this command has today
    "model": "shapes",
    "how": "measured",
    "settings": {"batch": 1, "resolution": 128, "steps": 25},
    "included": "weights",
    "lengths": [1, 2, 5],
    "peak_bytes": {
        "full_autograd": [2**30, 2**31, 5 * 2**30],
        "leapalign_one_graph": [None, 2**30, None],
        "engine_paired": [2**20, 2**20, 2**20],
        "engine_held": [2**20, 2**20, None],
    },
    "growth": {
        "bytes_per_step": {"full_autograd": LAW, "engine_paired": {**LAW, "slope": 0.0, "r_squared": None}},
        "bytes_per_token": {"engine_paired": {**LAW, "r_squared": None}},
        "spread_over_lengths": {"engine_paired": 0.012},
    },
    "axes": {
        "resolution": {"values": [128, 256], "length": 2, "peak_bytes": {"engine_paired": [2**20, 2**21]}},
    },
}
HOST = {
    **HEAD,
    "command": "python -m bench host-optimizer",
    "threads": 2,
    "mparams_per_s": {"avx512": 300.0, "torch_fused_fp32": 250.0, "bnb_adamw8bit": None},
    "gb_per_s": {"avx512": 3.0, "torch_fused_fp32": 7.0, "copy": 11.0, "in_place_mix": 10.0},
    "spread": {"avx512": 0.04},
    "cores_obtained": {"avx512": 1.9},
    "left_out": {"bnb_adamw8bit": "ImportError: none"},
}
THROUGHPUT = {
    **GPU,
    "command": "python -m bench throughput --model flux1_dev",
    "device": "A GPU",
    "settings": {"resolution": 512, "batch": 8, "steps": 25},
    "matmul_flops_per_s": 1e14,
    "ways": [
        {
            "way": "streamed, 24GiB",
            "seconds": {"rollout": 20.0, "vjp": 8.0, "total": 28.0},
            "spread": 0.02,
            "images_per_s": 0.286,
            "flops_per_s": 5e13,
            "of_matmul": 0.5,
            "movement": {"h2d_bytes": 48e9, "d2h_bytes": 24e9, "overlap": 0.93},
            "peak_device_bytes": 20 * 2**30,
            "planned_peak_bytes": 21 * 2**30,
            "steps": 25,
        },
        {"way": "resident", "out_of_memory_bytes": 24 * 2**30, "steps": 4},
        {"way": "streamed, 8GiB", "refused": "plan needs 9 GiB\nand more"},
        {"way": "plain", "failed": "ValueError: of us"},
    ],
}
TIMED = {
    **GPU,
    "command": "python -m bench kernels --resolution 512 1024",
    "device": "A GPU",
    "failed": [{"operation": "gated forward", "dtype": "bf16", "faults": ["RuntimeError: of us"]}],
    "operations": [
        {
            "operation": name,
            "dtype": "bf16",
            "resolution": resolution,
            "moved_bytes": 20_000_000,
            "copy": {"seconds": 1e-5, "bytes_per_second": 2e12},
            "ways": {
                "leapalign": {"seconds": 1.25e-5, "bytes_per_second": 1.6e12, "of_copy": 0.8},
                "torch eager": {"seconds": 5e-5, "bytes_per_second": 4e11, "of_copy": 0.2},
                "Liger": {"absent": "not installed"},
            },
        }
        for name, resolution in (("modulate forward", 512), ("modulate forward", 1024), ("adamw8bit", None))
    ],
}
RUN = {
    **GPU,
    "command": "python -m bench gpu",
    "tiny": False,
    "gpu": {"name": "A GPU", "bytes": 24 * 2**30},
    "stages": {
        "correctness": {
            "status": "failed",
            "seconds": 61.2,
            "error": None,
            "rows": [{"key": "leap", "passed": True}, {"key": "gated | wide", "passed": False, "error": "wrong"}],
        },
        "ceilings": {
            "status": "passed",
            "seconds": 3.0,
            "rows": [{"key": "matrix product", "flops_per_s": 9e13}, {"key": "copies", "h2d": 25e9, "d2h": 24e9}],
        },
        "step-24": {"status": "failed", "seconds": 3.0, "error": "no end in 3 s\nKilled", "rows": []},
        "step-48": {"status": "skipped", "error": "4 s left, it takes 60 at least", "rows": []},
    },
}
DOCTOR: dict[str, Any] = {
    "date": "2026-01-02",
    "command": "leapalign doctor --seconds 0.5",
    "leapalign": "0.1.0",
    "machine": {"flops_per_s": 1e14},
    "device": "cuda:0",
    "gpu": {"name": "A GPU"},
    "host": {"cpu": "A CPU", "threads": 2},
    "software": {"python": "3.11.7", "torch": "2.13.0", "triton": None},
    "rates": {"matmul_flops_per_s": 1e14, "copies": {"h2d": 25e9}, "host": {"copy": 11e9}},
    "presets": [{"name": "flux1_dev_24gb", "fits": False, "text": "does not fit: 60 GiB of host memory"}],
}
CURVES: dict[str, Any] = {
    **HEAD,
    "command": "python -m bench curves",
    "summary": {
        "window": 5,
        "float32": {"end": 0.35},
        **{
            name: {
                "end": 0.36,
                "paired_difference": {"mean": mean, "standard_error": 0.002},
                "paired_distance": 0.01,
                "share_within": 0.9,
                "largest_ratio": 1.5,
            }
            for name, mean in (("8-bit, bf16", -0.0032), ("float32, fused", 0.001))
        },
    },
    "validation": {
        name: {key: {"change": {"mean": 0.04, "standard_error": 0.01}} for key in ("reward", "accuracy")}
        for name in ("float32", "8-bit, bf16", "float32, fused")
    },
    "runs": {"float32": [{"rewards": [0.3] * 50}] * 3},
}
TRACKING = {
    **HEAD,
    "command": "python -m bench tracking --steps 10 --seeds 1",
    "every": 1,
    "runs": [{"float32": {"losses": [1.0] * 11, "distances": []}}],
    "summary": {
        "float32": {"gain": 0.5, "difference": 0.0, "spread": None, "largest_difference": 0.0, "distance": 0.0},
        "8-bit": {"gain": 0.49, "difference": 0.01, "spread": 0.002, "largest_difference": 0.011, "distance": 0.2},
    },
}

# name of the section, name of the file, result, what its table says
CASES = [
    (
        "trajectory",
        "trajectory-shapes",
        TRAJECTORY,
        [
            "| shapes | 1 step | 2 steps | 5 steps | a step more |",
            "| all steps in one graph | 1.00 GiB | 2.00 GiB | 5.00 GiB | +1.00 MiB, R² 1.0000 |",
            "| LeapAlign as published, one graph |  | 1.00 GiB |  |  |",
            "Measured on real tensors: batch 1, resolution 128, steps 25.",
            "| shapes, two steps | token more |",
            "| this engine, block inputs kept | +1.00 MiB |",
            "1.2 % (this engine, block inputs kept)",
        ],
    ),
    (
        "host-optimizer",
        "host-optimizer",
        HOST,
        [
            "| 8-bit in C++, AVX-512 | 300 | 3.0 | 1.20 | 4 % | 1.90 |",
            "| a copy |  | 11.0 |  |  |  |",
            "| 8-bit in C++, AVX-512 | torch fused, fp32 weights | 1.2 | 1.20 | yes |",
            "| 8-bit in C++, AVX-512 | the 8-bit update's traffic without its arithmetic | 0.4 | 0.30 | no |",
            "2 threads of A CPU, all in turn. Not measured: bnb_adamw8bit, ImportError: none.",
        ],
    ),
    (
        "throughput",
        "throughput-flux1-dev",
        THROUGHPUT,
        [
            "| A GPU | s a step | rollout | vjp | images/s |",
            "| streamed, 24GiB | 28.00 ± 1 % | 20.00 | 8.00 | 0.286 | 50.0 | 50 % |",
            "| 48.0 + 24.0 | 93 % | 20.0 GiB | 21.0 GiB |",
            "Rollout steps: 4 in resident.",
            "| resident | out of memory at 24 GiB |",
            "| streamed, 8GiB | plan needs 9 GiB |",
            "| plain | ValueError: of us |",
            "reached 100.0 TFLOP/s",
        ],
    ),
    (
        "kernels-timed",
        "kernels-a-gpu",
        TIMED,
        [
            "| A GPU | MB moved | copy, GB/s | leapalign, GB/s | torch eager, GB/s | Liger, GB/s |",
            "| modulate forward bf16, 1024² | 20.0 | 2000 | 1600 (80 %) | 400 (20 %) |  |",
            "| adamw8bit bf16 | 20.0 |",
            "reaches. gated forward bf16 failed: RuntimeError: of us. Command",
        ],
    ),
    (
        "gpu",
        "a-gpu-2026-01-02",
        RUN,
        [
            "| correctness | failed | 61 | 1 of 2 checks passed; failed: gated / wide |",
            "| ceilings | passed | 3 | matrix product: flops per s 90.0 TFLOP/s; copies: h2d 25.0 GB/s, d2h 24.0 GB/s",
            "| step-24 | failed | 3 | Killed |",
            "| step-48 | skipped |  | 4 s left, it takes 60 at least |",
        ],
    ),
    (
        "doctor",
        "doctor-a-machine",
        DOCTOR,
        [
            "| rate | A GPU |",
            "| matmul_flops_per_s | 100.0 TFLOP/s |",
            "| copies h2d | 25.0 GB/s |",
            "| flux1_dev_24gb | does not fit: 60 GiB of host memory |",
            "Command: `leapalign doctor --seconds 0.5`.",
            "Measured 2026-01-02, A GPU, Python 3.11.7, Torch 2.13.0.",
        ],
    ),
    (
        "curves",
        "curves-shapes",
        CURVES,
        [
            "| 8-bit, bf16 | 0.360 | +0.040 ± 0.010 | +4.0 ± 1.0 | -0.0032 ± 0.0020 |",
            "Over all steps 8-bit, bf16 differs most in reward from float32, by 1.6 standard errors.",
        ],
    ),
    (
        "tracking",
        "tracking-shapes",
        TRACKING,
        ["| 8-bit | 0.49000 | +0.010000 ± 0.002000 | +0.011000 | 0.2000 |", "1 seed, 10 steps each"],
    ),
]


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    """Where commands of other branches would not count as stale."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "is_stale", lambda result: False)
    return tmp_path


@pytest.mark.parametrize(("name", "file", "result", "told"), CASES, ids=[case[0] for case in CASES])
def test_section_of_a_result_file(results_folder, name, file, result, told):
    (results_folder / f"{file}.json").write_text(json.dumps(result))
    results = report.load()
    section = next(section for section in SECTIONS if section.name == name)
    _, _, body = report.page(results).partition(f"## {section.title}\n")
    body, _, _ = body.partition("\n## ")
    for line in told:
        assert line in body
    figure = section.figure
    assert (f"(figures/{figure.name}.png)" in body) if figure else "![" not in body
    others = [other.name for other in SECTIONS if report.chosen(other, results) and other.table([result])]
    assert others == [name]  # no other section takes it for its own


@pytest.mark.parametrize(
    ("name", "file", "result", "told"),
    [
        ("trajectory", "trajectory-shapes", TRAJECTORY, "| all steps in one graph | 1.00 GiB |"),
        (
            "host-optimizer",
            "host-optimizer",
            HOST,
            "8-bit in C++, AVX-512: 300 million parameters a second, 1.20 times",
        ),
        ("kernels-timed", "kernels-a-gpu", TIMED, "| modulate forward bf16 | 1600 | 80 % | 4.00 |  |"),
        ("gpu", "a-gpu-2026-01-02", RUN, "| step-24 | failed | 3 |\n"),
        ("curves", "curves-shapes", CURVES, "8-bit, bf16 differs most in reward from float32, by 1.6 standard errors."),
    ],
)
def test_what_the_readme_quotes_is_short(results_folder, name, file, result, told):
    (results_folder / f"{file}.json").write_text(json.dumps(result))
    text = report.fill(f"<!-- generated by `python -m bench report`: {name} -->\n<!-- end -->", report.load())
    assert told in text


def test_stages_of_a_run_stand_where_their_benchmarks_do(results_folder):
    """Steps with the throughput and operations with the kernels; figures as well."""
    stages = {
        "step-24": {"status": "passed", "rows": [{**way, "matmul_flops_per_s": 1e14} for way in THROUGHPUT["ways"]]},
        "kernels": {"status": "passed", "rows": [{"key": "one", **row} for row in TIMED["operations"]]},
    }
    (results_folder / "a-gpu-2026-01-02.json").write_text(json.dumps({**RUN, "stages": stages}))
    results = report.load()
    text = report.page(results)
    assert "| resident | out of memory at 24 GiB |" in text and "stage step-24" in text
    assert "| modulate forward bf16, 1024² | 20.0 |" in text
    assert "| step-24 | passed |  | 4 rows, above |" in text
    assert {figure.name for figure, _ in report.shown(results)} == {"seconds-by-phase", "kernels-roofline"}


def test_doctor_without_a_gpu_says_of_what_it_is(results_folder):
    (results_folder / "doctor.json").write_text(json.dumps({**DOCTOR, "device": "cpu", "gpu": None}))
    text = report.page(report.load())
    assert "| rate | 2 threads of A CPU |" in text
    assert "Measured 2026-01-02, 2 threads of A CPU, Python 3.11.7, Torch 2.13.0." in text


def test_a_faulty_step_is_marked_and_not_drawn(results_folder):
    """The others of its table stay."""
    good = {**THROUGHPUT["ways"][0], "key": "512", "matmul_flops_per_s": 1e14, "faults": []}
    bad = {
        **good,
        "key": "1024",
        "way": "1024 pixels, 24GiB",
        "faults": ["the loss is not finite", "weights have not changed"],
    }
    stages = {"step-24": {"status": "failed", "rows": [good, bad]}}
    (results_folder / "a-gpu-2026-01-02.json").write_text(json.dumps({**RUN, "stages": stages}))
    results = report.load()
    text = report.page(results)
    assert "| 1024 pixels, 24GiB (faulty) | 28.00" in text and "| streamed, 24GiB | 28.00" in text
    faults = "1024 pixels, 24GiB: the loss is not finite, weights have not changed."
    assert f"Faulty, and not in the figure: {faults}" in text
    ((_, data),) = report.shown(results)
    assert [list(panel["ways"]) for panel in data] == [["streamed, 24GiB"]]
    assert figures.PHASES.data([{**THROUGHPUT, "ways": [bad]}]) == []


def quoted(name: str, results: list[dict[str, Any]]) -> str:
    section = next(section for section in SECTIONS if section.name == name)
    assert section.quoted is not None
    return section.quoted(results)


def test_readme_quotes_a_trajectory_that_a_gpu_showed():
    """Before a larger one that was counted, or measured on a CPU."""
    counted = {**TRAJECTORY, "model": "flux1_dev", "how": "counted"}
    counted["peak_bytes"] = {**TRAJECTORY["peak_bytes"], "full_autograd": [2**38] * 3}
    on_gpu = {**TRAJECTORY, "model": "sd35_medium", "device": "A GPU"}
    assert quoted("trajectory", [counted, on_gpu]).startswith("| sd35_medium | 1 step")
    assert quoted("trajectory", [on_gpu, counted]).startswith("| sd35_medium | 1 step")
    assert quoted("trajectory", [TRAJECTORY, counted]).startswith("| flux1_dev | 1 step")


def step(**settings: Any) -> dict[str, Any]:
    default = {"simulate": "m", "resolution": 512, "batch": 8, "resident": "none", "mode": "paired", "recompute": False}
    found = {**default, "microbatch": 1, **settings}
    command = f"python -m bench memory --simulate m --microbatch {found['microbatch']} --mode {found['mode']}"
    peaks = {"counted_peak_bytes": found["microbatch"] * 2**30, "forwards_per_image": 33.0, "parameters": 10**9}
    return {"settings": found, "command": command, **peaks}


def test_readme_quotes_the_command_of_the_first_row_that_it_shows():
    shown = [step(microbatch=2), step(resolution=1024, microbatch=4)]
    hidden = [step(mode="held"), step(recompute=True, microbatch=8)]
    text = quoted("memory", [*hidden, *shown])
    assert "First row: `python -m bench memory --simulate m --microbatch 2 --mode paired`." in text
    assert "microbatch 2 and 4, optimizer on the host" in text
    assert quoted("memory", hidden) == ""


def test_a_cpu_does_not_stand_for_a_gpu(results_folder):
    """Small numbers keep their digits, and what only a GPU shows stays to be measured."""
    way = {**THROUGHPUT["ways"][0], "seconds": {"rollout": 0.5031, "update": 0.00148, "total": 1.1}}
    way |= {"flops_per_s": 1.08e10, "movement": {"h2d_bytes": 2.2e6, "d2h_bytes": 6.4e6, "overlap": None}}
    small = {**THROUGHPUT, **HEAD, "device": "cpu", "matmul_flops_per_s": 3.17e10, "ways": [way]}
    small["settings"] = {"model": "shapes", **small["settings"]}
    (results_folder / "throughput-shapes.json").write_text(json.dumps(small))
    results = report.load()
    text = report.page(results)
    assert "| 2 threads of A CPU | s a step | rollout | update |" in text
    assert "| 1.10 ± 1 % | 0.5 | 0.0015 | 0.286 | 0.011 | 50 % | 0.0022 + 0.0064 |" in text
    assert "reached 0.032 TFLOP/s" in text
    missing = "On a GPU: not measured, `python -m bench throughput --model flux1_dev"
    assert missing in text
    ((figure, data),) = report.shown(results)
    assert figure.name == "seconds-by-phase" and data[0]["title"] == "shapes on 2 threads of A CPU"
    (results_folder / "throughput-flux1-dev.json").write_text(json.dumps(THROUGHPUT))
    assert missing not in report.page(report.load())


def test_the_host_optimizer_without_our_module_has_no_sentence():
    section = next(section for section in SECTIONS if section.name == "host-optimizer")
    assert section.quoted is not None
    assert section.quoted([{**HOST, "mparams_per_s": {"torch_fused_fp32": 250.0}}]) == ""


# ---- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "result", "panels"),
    [
        (figures.TRAJECTORY, TRAJECTORY, 1),
        (figures.RESOLUTION, TRAJECTORY, 1),
        (figures.PHASES, THROUGHPUT, 1),
        (figures.ROOFLINE, TIMED, 1),
        (figures.HOST, HOST, 1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_figure(figure, result, panels, tmp_path):
    """It is drawn, and knows what it was drawn from."""
    data = figure.data([result])
    assert len(data) == panels
    path = tmp_path / "figure.png"
    assert not figures.is_current(path, figure.digest(data))
    figures.write(figure, data, path)
    assert figures.is_current(path, figure.digest(data))
    assert not figures.is_current(path, figure.digest([{**data[0], "title": "another"}]))
    first = path.read_bytes()
    figures.write(figure, data, path)
    assert path.read_bytes() == first  # of one matplotlib: no date and no version
    assert b"Matplotlib" not in first


def test_a_line_needs_two_resolutions():
    counted = {
        "counted_peak_bytes": 1,
        "settings": {
            "simulate": "m",
            "resolution": 512,
            "batch": 1,
            "resident": "none",
            "mode": "held",
            "recompute": 0,
        },
    }
    assert figures.RESOLUTION.data([counted]) == []
