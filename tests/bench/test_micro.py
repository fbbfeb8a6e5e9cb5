"""The micro-benchmarks run, and say what they move; how long they take is nobody's test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ONE_ROUND = ["--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0"]


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """A pytest inside this one, with the project's settings; what it prints."""
    folder = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(ROOT / "bench")]
    code = pytest.main([*folder, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments])
    printed = capsys.readouterr().out
    assert code == 0, printed[-3000:]
    return printed


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Benchmarks are off in a worker of xdist, which is known by this variable."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def test_each_says_what_it_moves_and_where_and_is_compared_with_a_saved_run(tmp_path, capsys):
    where = f"--benchmark-storage={tmp_path}"
    run("-k", "test_quantize or (test_vjp and streamed)", *ONE_ROUND, where, "--benchmark-save=first", capsys=capsys)
    printed = run("-k", "test_quantize", *ONE_ROUND, where, "--benchmark-compare", capsys=capsys)
    assert "(0001_first)" in printed
    (file,) = tmp_path.rglob("0001_first.json")
    found: list[dict[str, Any]] = json.loads(file.read_text())["benchmarks"]
    assert {each["group"] for each in found} == {"quantize", "products of a tiny FLUX"}
    for each in found:
        info = each["extra_info"]
        assert info["bytes"] > 0 and info["device"]
        assert info["GB/s"] == pytest.approx(info["bytes"] / each["stats"]["median"] / 1e9)
        assert info["fraction of copy"] > 0


def test_the_others_run(capsys):
    """Once each and without timing; on one of the instruction sets, which differ in nothing else here."""
    chosen = "not scalar and not avx2 and not float32 and not quantize and not vjp and not reference"
    printed = run("--benchmark-disable", "-k", chosen, capsys=capsys)
    assert " passed" in printed


def test_the_test_suite_does_not_collect_them(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
