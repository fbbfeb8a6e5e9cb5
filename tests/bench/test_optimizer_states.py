"""What `python -m bench optimizer-states` counts is what the optimizers hold."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from bench import record
from bench.__main__ import main
from bench.memory import optimizer_states
from bench.memory.optimizer_states import Parameters, measured, storage_bytes, ways
from leapalign.engine.memory.store import ALIGNMENT
from leapalign.kernels.adamw8bit.quantize import BLOCK

WIDTH = 256


@pytest.fixture(scope="module")
def parameters() -> list[Tensor]:
    return list(Parameters(WIDTH, torch.bfloat16).parameters())


def held(name: str) -> dict[str, int]:
    way = ways()[name]
    assert not isinstance(way, str)
    return way(WIDTH)


def test_every_storage_counts_once_and_whole():
    shared = torch.zeros(100)
    nested = {"a": [shared[:10], shared], "b": {"c": torch.zeros(3, dtype=torch.uint8)}, "step": 1, "none": None}
    assert storage_bytes(nested) == 400 + 3


def test_torch_holds_two_moments_and_a_step(parameters):
    count, scalars = sum(p.numel() for p in parameters), 4 * len(parameters)
    assert held("torch AdamW, float32") == {"weights": 4 * count, "states": 8 * count + scalars, "gradients": 4 * count}
    assert held("torch AdamW, bfloat16") == {
        "weights": 2 * count,
        "states": 4 * count + scalars,
        "gradients": 2 * count,
    }


@pytest.mark.parametrize(
    ("name", "extra", "gradients"),
    [
        ("leapalign AdamW8bit", 0, 0),
        ("leapalign, 8-bit residual", 1, 0),
        ("leapalign, float32 master", 4, 0),
        ("leapalign, average (EMA)", 2, 0),
        ("leapalign, global-norm clip", 0, 2),
    ],
)
def test_ours_holds_what_its_docstring_says(name, extra, gradients, parameters):
    """Two codes and 2 x 4 bytes for 256 elements, of parameters that are each filled up to the store's alignment."""
    count = sum(-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters)
    states = 2 * count + 2 * 4 * count // BLOCK + extra * count
    assert held(name) == {"weights": 2 * count, "states": states, "gradients": gradients * count}


def test_what_is_not_there_says_why(monkeypatch):
    def refuses(width: int) -> dict[str, int]:
        raise NotImplementedError("needs a CUDA device\nmore words")

    monkeypatch.setattr(optimizer_states, "ways", lambda: {"one": "not installed", "two": refuses})
    found = measured(WIDTH)["optimizers"]
    assert found == {"one": {"absent": "not installed"}, "two": {"absent": "needs a CUDA device"}}
    assert "not installed" in optimizer_states.table({"optimizers": found})


def test_command_writes_a_result_file_that_names_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(optimizer_states, "_WIDTH", WIDTH)
    quick = {name: way for name, way in ways().items() if name.startswith(("leapalign A", "torch"))}
    monkeypatch.setattr(optimizer_states, "ways", lambda: quick)
    assert main(["optimizer-states", "--json", "--output", "states"]) == 0
    assert json.loads(capsys.readouterr().out)["optimizers"].keys() == quick.keys()
    written = json.loads((tmp_path / "states.json").read_text())
    assert written["command"] == "python -m bench optimizer-states --output states"
    assert 16 < sum(written["optimizers"]["torch AdamW, float32"].values()) < 16.01


def test_unknown_argument(capsys):
    assert main(["optimizer-states", "--what"]) == 2
    assert "unknown argument --what" in capsys.readouterr().err
