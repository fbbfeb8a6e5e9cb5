"""`python -m bench host-optimizer`: what it reports. How fast anything is, is not tested."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench.__main__ import main
from leapalign.kernels.host import native as host


def bench(*arguments: str) -> int:
    return main(["host-optimizer", "--parameters", "70000", "--rounds", "2", *arguments])


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *values, **options: printed.extend([] if options else map(str, values)))
        assert bench("--threads", "1", "--json") == 0
    found: dict[str, Any] = json.loads("\n".join(printed))
    return found


def test_every_contender_has_a_rate_or_a_reason(results: dict[str, Any]) -> None:
    rates = results["mparams_per_s"]
    expected = {*host.instruction_sets(), "torch_reference", "torch_fused_fp32", "torch_fused_bf16"}
    assert expected | {"bnb_adamw8bit", "torchao_adamw8bit"} <= rates.keys()
    assert all((rate is None) == (name in results["left_out"]) for name, rate in rates.items())
    assert all(rates[name] > 0 for name in expected)
    measured = {name for name, rate in rates.items() if rate is not None}
    assert results["gb_per_s"].keys() == results["cores_obtained"].keys() == measured | {"copy", "in_place_mix"}
    assert results["threads"] == 1


def test_ratios_are_of_the_same_run(results: dict[str, Any]) -> None:
    rates, gigabytes = results["mparams_per_s"], results["gb_per_s"]
    for name, ratio in results["of_torch_fused_fp32"].items():
        assert ratio == pytest.approx(rates[name] / rates["torch_fused_fp32"])
        assert results["of_in_place_mix"][name] == pytest.approx(gigabytes[name] / gigabytes["in_place_mix"])
    assert gigabytes["torch_fused_fp32"] == pytest.approx(rates["torch_fused_fp32"] * 28e-3)


def test_the_table_and_the_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    assert bench("--threads", "2") == 0
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert out.startswith("2 threads") and "in_place_mix" in out


def test_without_the_native_module_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "native", None)
    monkeypatch.setattr(host, "missing", "no compiler")
    assert bench("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"]["adamw8bit"] == "the native module is missing: no compiler"
    assert found["mparams_per_s"]["torch_reference"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parameters", "10"], "parameters=10 must be at least 256"),
        (["--rounds", "1"], "rounds=1 must be at least 2"),
        (["--threads", "0"], "threads=0 must be at least 1"),
        (["--sizes", "3"], "unknown argument --sizes"),
    ],
)
def test_wrong_settings(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host-optimizer", *arguments]) == 2
    assert message in capsys.readouterr().err
