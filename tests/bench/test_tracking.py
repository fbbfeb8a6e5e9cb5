"""`python -m bench tracking`: every way sees the same training. How well it goes is the benchmark's to say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.__main__ import main
from bench.training import tracking


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        for name, value in (("SCENES", 32), ("HELD_OUT", 16), ("BATCH", 4)):
            patch.setattr(tracking, name, value)
        patch.setattr("builtins.print", lambda *values, **options: printed.extend([] if options else map(str, values)))
        assert main(["tracking", "--steps", "10", "--seeds", "1", "--json"]) == 0
    found: dict[str, Any] = json.loads("\n".join(printed))
    return found


def test_all_ways_begin_alike_and_learn(results: dict[str, Any]) -> None:
    (run,) = results["runs"]
    assert run.keys() == tracking.WAYS.keys()
    first = {way["losses"][0] for way in run.values()}
    assert len(first) == 1
    for name, way in run.items():
        assert len(way["losses"]) == 11 and len(way["distances"]) == 10
        assert way["losses"][-1] < way["losses"][0], name


def test_distances_are_from_float32(results: dict[str, Any]) -> None:
    (run,) = results["runs"]
    assert set(run["float32"]["distances"]) == {0.0}
    rounding, codes, weights = (
        run[name]["distances"][-1] for name in ("float32, half microbatch", "8-bit, float32", "8-bit, bf16")
    )
    assert 0 < rounding < codes < weights < 1
    assert results["summary"]["8-bit, bf16"]["difference"] == pytest.approx(
        run["8-bit, bf16"]["losses"][-1] - run["float32"]["losses"][-1]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "25"], "steps=25 must be a multiple of 10"),
        (["--seeds", "0"], "seeds=0 must be at least 1"),
        (["--batches", "1"], "unknown argument --batches"),
    ],
)
def test_wrong_settings(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tracking", *arguments]) == 2
    assert message in capsys.readouterr().err
