"""The numbers that compare reward curves are those of their definitions, and the command measures real runs."""

from __future__ import annotations

import json
import math

import pytest

from bench import record
from bench.__main__ import main
from bench.training.curves import WAYS, smooth, summarise
from leapalign.config.loading import load_config


def test_smoothing_is_the_mean_of_consecutive_steps():
    assert smooth([1.0, 2.0, 6.0, 4.0], 3) == [3.0, 4.0]
    assert smooth([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]


def test_a_run_shorter_than_the_window_has_one_mean():
    assert smooth([1.0, 2.0], 5) == [1.5]


def test_distances_are_in_deviations_of_float32():
    """Two seeds at -d and d around m have the deviation sqrt(2) d. All numbers are small multiples of 1/4, so exact."""
    exact = [[0.0, 1.0, 2.0], [2.0, 2.0, 2.5]]  # means 1, 1.5, 2.25; deviations sqrt(2) times 1, 0.5, 0.25
    other = [[0.5, 1.0, 3.0], [2.0, 3.0, 3.0]]  # means 1.25, 2, 3
    found = summarise({"float32": exact, "8-bit, bf16": other}, window=1)
    assert found["float32"] == {"start": 1.0, "end": 2.25}
    row = found["8-bit, bf16"]
    assert row["ratios"] == pytest.approx([0.25 / 2**0.5, 0.5 / 0.5 / 2**0.5, 0.75 / 0.25 / 2**0.5], rel=1e-12)
    assert row["largest_ratio"] == row["ratios"][2]
    assert row["share_within"] == pytest.approx(2 / 3)
    pooled = math.sqrt(2 * (1 + 0.25 + 0.0625) / 3)
    assert row["largest_ratio_pooled"] == pytest.approx(0.75 / pooled, rel=1e-12)
    differences = [1.5 / 3, 1.5 / 3]
    assert row["paired_difference"]["by_seed"] == pytest.approx(differences)
    assert row["paired_difference"]["mean"] == pytest.approx(0.5)
    assert row["paired_difference"]["standard_error"] == pytest.approx(0, abs=1e-12)
    last = [0, 1, 1, 0.5]  # differences of the last two of three steps, seed by seed
    assert row["paired_distance"] == pytest.approx(math.sqrt(sum(x * x for x in last) / 4), rel=1e-12)


def test_pairing_takes_out_what_the_seeds_share():
    """Far apart seeds, each 1/8 and 3/8 higher: 1/4 with the standard error (1/4 / sqrt(2)) / sqrt(2) = 1/8."""
    exact = [[0.0] * 4, [100.0] * 4]
    other = [[0.125] * 4, [100.375] * 4]
    row = summarise({"float32": exact, "8-bit, bf16": other}, window=2)["8-bit, bf16"]
    assert row["paired_difference"]["mean"] == 0.25
    assert row["paired_difference"]["standard_error"] == pytest.approx(0.125, rel=1e-12)
    assert row["share_within"] == 1


def test_one_seed_has_no_spread():
    row = summarise({"float32": [[0.0, 1.0]], "8-bit, bf16": [[1.0, 1.0]]}, window=1)["8-bit, bf16"]
    assert row["largest_ratio"] is None and row["share_within"] is None
    assert row["paired_difference"] == {"by_seed": [0.5], "mean": 0.5, "standard_error": None}


def test_the_command_measures_and_plots(tmp_path, monkeypatch, capsys):
    """Two steps a way; the picture then needs no run."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    sizes = ["curves", "--seeds", "1", "--steps", "2", "--batch", "2"]
    short = [
        *["--num_inference_steps", "2", "--validation_inference_steps", "2"],
        *["--train_prompts", str(prompts), "--validation_prompts", "[a red circle]"],
        *["--cache_dir", str(tmp_path / "cache")],
    ]
    folder = tmp_path / "runs"
    assert main([*sizes, "--folder", str(folder), *short]) == 0
    found = record.read("curves-shapes")
    assert list(found["runs"]) == list(WAYS)
    assert "--steps 2 --batch 2" in found["command"] and "--folder" not in found["command"]
    keys, chosen = ("optimizer", "weight_dtype", "master", "microbatch", "kernels"), []
    for name, (one,) in found["runs"].items():
        own = folder / f"seed-0-{name.replace(', ', '-').replace(' ', '-')}"
        rows = [json.loads(line) for line in (own / "metrics.jsonl").open()]
        assert one["rewards"] == [row["reward"] for row in rows] and len(rows) == 2
        assert one["before"]["reward"]["mean"] == found["validation"][name]["reward"]["before"]["mean"]
        chosen.append([getattr(load_config(own / "config.yaml"), key) for key in keys])
    assert chosen == [
        ["adamw", "float32", "stochastic", 2, "torch"],
        ["adamw", "float32", "stochastic", 1, "torch"],
        ["adamw8bit", "bf16", "stochastic", 2, "torch"],
        ["adamw8bit", "bf16", "residual", 2, "torch"],
        ["adamw", "float32", "stochastic", 2, "triton"],
        ["adamw8bit", "bf16", "stochastic", 2, "triton"],
    ]

    assert main(["curves", "--plot", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["--seeds", "0"], ["--window", "0"], ["--learning_rate", "-1"], ["--frobnicate", "1"]]
)
def test_wrong_settings_are_told_in_one_line(wrong, capsys):
    assert main(["curves", *wrong]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and wrong[0].lstrip("-") in error
