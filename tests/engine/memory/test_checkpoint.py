"""Folders whole or absent at every instant, and optimizer states bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from leapalign.engine.memory import checkpoint
from leapalign.engine.memory.checkpoint import (
    atomic_folder,
    checkpoint_folder,
    clean,
    list_checkpoints,
    load_into,
    load_optimizer,
    prune,
    save_optimizer,
    save_tensors,
    write_atomically,
)


class KilledError(BaseException):
    """Ends the process as far as the code under test can tell: nothing after it runs, no clean-up either."""


def make(output_dir: Path, step: int) -> Path:
    with atomic_folder(checkpoint_folder(output_dir, step)) as folder:
        (folder / checkpoint.STATE_FILE).write_text(json.dumps({"step": step}))
    return checkpoint_folder(output_dir, step)


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out" / "checkpoint-000001"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert [p.name for p in target.parent.iterdir()] == ["checkpoint-000001"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    target = make(tmp_path, 3)

    def fill() -> None:
        with atomic_folder(target) as folder:
            (folder / "half").write_text("x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill()
    assert [p.name for p in target.iterdir()] == [checkpoint.STATE_FILE]
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = make(tmp_path, 3)
    with atomic_folder(target) as folder:
        (folder / "new").write_text("x")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_at_any_rename_old_or_new_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    target = make(tmp_path, 3)
    rename, done = Path.rename, 0

    def until_killed(self: Path, other: Path) -> Path:
        nonlocal done
        if done == renames:
            raise KilledError
        done += 1
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until_killed)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # a dead process tidies nothing
        try:
            with atomic_folder(target) as folder:
                (folder / checkpoint.STATE_FILE).write_text("new")
        except KilledError:
            assert renames < 2
    clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [target.name]
    content = (target / checkpoint.STATE_FILE).read_text()
    assert content == ("new" if renames == 2 else '{"step": 3}')


def test_checkpoints_are_listed_by_step_and_pruned_from_the_oldest(tmp_path: Path) -> None:
    for step in (1000000, 20, 3):  # the first has more digits than the name's padding
        make(tmp_path, step)
    (tmp_path / "checkpoint-000099").mkdir()  # without its state it is no checkpoint
    (tmp_path / "checkpoint-best").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "checkpoint-000003",
        "checkpoint-000020",
        "checkpoint-1000000",
    ]
    prune(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 3
    prune(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-000020", "checkpoint-1000000"]
    prune(tmp_path, 5)
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_file_is_replaced_or_untouched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_atomically(path, "one\n")
    write_atomically(path, "two\n")
    assert path.read_text() == "two\n"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensors_are_split_into_shards_and_come_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(10, generator=generator) for i in range(5)}
    save_tensors(tensors, tmp_path, stem="part", shard_bytes=80)  # two of 40 bytes
    files = sorted(tmp_path.iterdir())
    assert [len(load_file(file)) for file in files] == [2, 2, 1]
    into = {name: torch.zeros(10, dtype=torch.float64) for name in tensors}
    load_into(into, files)
    assert all(torch.equal(into[name], tensors[name].double()) for name in tensors)


def test_a_file_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"holds a .*not in this model"):
        load_into({}, [tmp_path / "x.safetensors"])
    with pytest.raises(ValueError, match=r"holds a \(2,\), which is \(3,\) in this model"):
        load_into({"a": torch.zeros(3)}, [tmp_path / "x.safetensors"])
    with pytest.raises(ValueError, match=r"no saved value, e\.g\. b"):
        load_into({"a": torch.zeros(2), "b": torch.zeros(1)}, [tmp_path / "x.safetensors"])


def run_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[torch.Tensor, str]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        extra = {"fused": True} if kind is torch.optim.AdamW else {"momentum": 0.9}
        names: dict[torch.Tensor, str] = {p: n for n, p in model.named_parameters()}
        optimizer: Any = kind  # each class has arguments of its own
        return model, optimizer(model.parameters(), lr=0.1, **extra), names

    whole, optimizer, _ = fresh()
    run_steps(whole, optimizer, 0, 6)
    first, optimizer, names = fresh()
    run_steps(first, optimizer, 0, 3)
    save_optimizer(optimizer, names, tmp_path / "optimizer")
    assert not [p for p in (tmp_path / "optimizer").iterdir() if p.suffix not in (".json", ".safetensors")]
    second, resumed, names = fresh()
    second.load_state_dict(first.state_dict())
    load_optimizer(resumed, names, tmp_path / "optimizer")
    run_steps(second, resumed, 3, 6)
    for name, expected in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], expected)


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    run_steps(model, optimizer, 0, 1)
    save_optimizer(optimizer, {p: n for n, p in model.named_parameters()}, tmp_path)
    other = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(ValueError, match="states of bias"):
        load_optimizer(torch.optim.AdamW(other.parameters()), {other.weight: "weight"}, tmp_path)
