"""What a run does with values that are not finite, trackers that fail, and graphs that must not outlive a phase."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.config.keys import AlignConfig
from leapalign.errors import UsageError
from leapalign.run import tracking, trainer
from leapalign.run.state import learning_rate
from leapalign.run.trainer import Trainer
from tests.families.tiny_pipeline import PROMPTS, ColourReward, tiny_config
from tests.run.training import AtCall, everything, rows


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_changes_nothing(folder: Path, tmp_path: Path, bad: float) -> None:
    snapshots: list[dict[str, Tensor]] = []

    class Watched(Trainer):
        def _train_step(self) -> dict[str, Any]:
            snapshots.append({name: t.clone() for name, t in everything(self.state).items()})
            return super()._train_step()

    reward = AtCall(3, lambda rewards: torch.where(torch.arange(3) == 1, bad, rewards))
    run = Watched(tiny_config(folder, tmp_path / "run"), reward=reward)
    run.run()
    before, after = snapshots[2], snapshots[3]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(snapshots[3][name], snapshots[4][name]) for name in after)
    row = rows(run)[2]
    assert row["skipped"]
    assert "samples [1]" in row["reason"]
    assert row["reward"] is None
    assert row["grad_norm"] is None
    assert [row["skipped"] for row in rows(run)] == [False, False, True, False, False]
    assert "1 steps were skipped" in (run.output_dir / "README.md").read_text()


def test_a_gradient_that_is_not_finite_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(tiny_config(folder, tmp_path / "run"), reward=ColourReward())
    run._load()
    before = {name: t.clone() for name, t in everything(run.state).items()}
    grads = {name: torch.ones_like(p) for name, p in run.state.parameters.items()}
    next(iter(grads.values())).view(-1)[0] = float("inf")
    with pytest.raises(FloatingPointError, match="gradient norm"):
        run.state.update(grads)
    after = everything(run.state)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_that_has_diverged_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "MOST_SKIPPED", 3)

    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        return ColourReward()(images, prompts) * float("nan")

    run = Trainer(tiny_config(folder, tmp_path / "run"), reward=broken)
    with pytest.raises(UsageError, match=r"3 steps in a row up to step 3 .* lower learning_rate = 0\.001"):
        run.run()
    assert [row["skipped"] for row in rows(run)] == [True] * 3


def test_samples_above_the_threshold_are_counted_out(folder: Path, tmp_path: Path) -> None:
    run = Trainer(tiny_config(folder, tmp_path / "run", threshold=-1.0, max_train_steps=2), reward=ColourReward())
    run.run()
    assert [(row["active"], row["loss"], row["grad_norm"]) for row in rows(run)] == [(0, 0, 0), (0, 0, 0)]


def test_phases_share_no_graph(folder: Path, tmp_path: Path) -> None:
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        if torch.is_grad_enabled():
            leaves, seen, stack = [], set(), [images.grad_fn]
            while stack:
                node = stack.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                if hasattr(node, "variable"):
                    leaves.append(node.variable)
                stack += [function for function, _ in node.next_functions]
            assert [tuple(leaf.shape) for leaf in leaves] == [(3, 4, 16)]  # the latents x_0 and no weight
        return ColourReward()(images, prompts)

    Trainer(tiny_config(folder, tmp_path / "run", max_train_steps=2), reward=reward).run()


def test_bfloat16_runs_and_keeps_float32_weights(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run", executor="autograd", mixed_precision="bf16", max_train_steps=2)
    run = Trainer(config, reward=ColourReward())
    run.run()
    assert {t.dtype for t in everything(run.state).values()} == {torch.float32}
    assert all(not row["skipped"] and row["grad_norm"] > 0 for row in rows(run))


def test_the_learning_rate_follows_its_course(folder: Path, tmp_path: Path) -> None:
    def course(kind: str, warmup: int) -> list[float]:
        changes = {"lr_scheduler": kind, "lr_warmup_steps": warmup, "learning_rate": 1.0, "max_train_steps": 6}
        config: AlignConfig = tiny_config(folder, tmp_path / "run", **changes)
        return [learning_rate(config, step) for step in range(1, 7)]

    assert course("constant", 0) == [1] * 6
    assert course("constant_with_warmup", 2) == [0.5, 1, 1, 1, 1, 1]
    assert course("linear", 2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert course("cosine", 0) == pytest.approx([1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873])


def test_trackers_and_previews_that_fail_are_told_and_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(tracking.TensorBoard, "scalars", fail)
    monkeypatch.setattr("leapalign.run.validation.evaluate", fail)
    monkeypatch.setitem(sys.modules, "wandb", None)
    changes = {"report_to": ["tensorboard", "wandb"], "validation_prompts": PROMPTS[:2], "max_train_steps": 2}
    outcome = Trainer(tiny_config(folder, tmp_path / "run", **changes), reward=ColourReward()).run()
    assert (outcome.summary.result / "config.json").is_file()
    assert outcome.summary.after is None
    told = " ".join(capfd.readouterr().err.split())
    assert "tensorboard fails (no luck)" in told
    assert "wandb does not start" in told
    assert "validation after step 0 failed: RuntimeError: no luck" in told


def test_rows_after_the_checkpoint_and_half_a_row_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    tracking._keep_rows(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
