"""The run as a whole: the same bits after a kill, the same weights however the batch is split, and its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from leapalign.data import embeddings
from leapalign.engine.memory.checkpoint import list_checkpoints
from leapalign.errors import UsageError
from leapalign.run.state import TrainState
from leapalign.run.trainer import Outcome, Trainer
from tests.families.tiny_pipeline import PROMPTS, ColourReward, tiny_config
from tests.run.training import AtCall, everything, rows

Reward = Callable[[Tensor, list[str]], Tensor]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Outcome]:
    """A run of 5 steps that nothing disturbed, with validation prompts and a checkpoint after steps 2 and 4."""
    config = tiny_config(folder, tmp_path_factory.mktemp("whole") / "run", **WHOLE)
    run = Trainer(config, reward=ColourReward())
    return run, run.run()


WHOLE: dict[str, Any] = {"validation_prompts": PROMPTS[:2], "report_to": ["tensorboard"], "validation_steps": 3}


def assert_same_bits(found: Any, expected: Any) -> None:
    ours, theirs = everything(found), everything(expected)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_a_run_leaves_what_the_conventions_promise(whole: tuple[Trainer, Outcome]) -> None:
    run, outcome = whole
    found = {path.name for path in run.output_dir.iterdir()}
    assert found == {
        "config.yaml", "versions.json", "metrics.jsonl", "logs", "samples", "transformer", "README.md", "plan.json",
        "checkpoint-000002", "checkpoint-000004",
    }  # fmt: skip
    parts = {path.name for path in (run.output_dir / "checkpoint-000004").iterdir()}
    assert parts == {"transformer", "transformer_ema", "optimizer", "trainer_state.json"}
    samples = {path.name for path in (run.output_dir / "samples").iterdir()}
    steps = ("000000", "000003", "000005")
    pictures = {f"step-{step}.{kind}" for step in steps for kind in ("png", "json")}
    assert samples == {*pictures, "step-000000.safetensors", "before_after.png"}
    assert any((run.output_dir / "logs").iterdir())
    assert not outcome.interrupted
    assert outcome.summary.picture == run.output_dir / "samples" / "before_after.png"
    assert "reward" in str(outcome.summary)
    card = (run.output_dir / "README.md").read_text()
    assert "| learning_rate | 0.001 |" in card
    assert "## Results" in card


def test_a_row_a_step_says_all_of_it(whole: tuple[Trainer, Outcome]) -> None:
    found = rows(whole[0])
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    for row in found:
        assert set(row) == {
            "step", "reward", "loss", "d_j", "d_0", "grad_norm", "lr", "active", "skipped", "reason", "seconds",
            "memory",
        }  # fmt: skip
        assert set(row["seconds"]) == {"rollout", "reward", "vjp", "optimizer", "total"}
        assert row["active"] == 1
        assert not row["skipped"]
        assert row["grad_norm"] > 0


def test_the_result_is_the_average_and_loads_as_a_stock_transformer(whole: tuple[Trainer, Outcome]) -> None:
    run, outcome = whole
    loaded = dict(FluxTransformer2DModel.from_pretrained(outcome.summary.result).named_parameters())
    assert isinstance(run.state, TrainState)
    assert run.state.ema is not None
    assert all(torch.equal(loaded[name], average) for name, average in run.state.ema.tensors.items())
    assert any(not torch.equal(loaded[name], p) for name, p in run.state.parameters.items())


def test_the_text_encoders_are_loaded_once_and_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = embeddings._encode
    calls: list[list[str]] = []

    def counted(family: Any, source: Path, prompts: list[str], *rest: Any) -> None:
        calls.append(prompts)
        encode(family, source, prompts, *rest)

    monkeypatch.setattr(embeddings, "_encode", counted)
    run = Trainer(tiny_config(folder, tmp_path / "run", max_train_steps=2), reward=ColourReward())
    run.run()
    assert [sorted(prompts) for prompts in calls] == [sorted(PROMPTS)]
    assert {type(value).__module__.split(".")[0] for value in vars(run).values()}.isdisjoint({"transformers"})


def test_training_raises_the_reward(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run", max_train_steps=30, validation_prompts=PROMPTS, ema_decay=0.5)
    summary = Trainer(config, reward=ColourReward()).run().summary
    assert summary.before is not None
    assert summary.after is not None
    assert summary.after.reward.mean > summary.before.reward.mean


def test_a_folder_with_a_run_is_left_alone(whole: tuple[Trainer, Outcome]) -> None:
    run, _ = whole
    before = (run.output_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="already holds a run"):
        Trainer(run.config, reward=ColourReward()).run()
    assert (run.output_dir / "metrics.jsonl").read_bytes() == before


KILLED = """
import os, signal, sys
from pathlib import Path
from leapalign.run import state
from leapalign.run.trainer import Trainer
from tests.families.tiny_pipeline import ColourReward, tiny_config
from tests.run.test_trainer import WHOLE

save, saves = state.checkpoints.save_optimizer, []

def save_and_die(*arguments):
    saves.append(arguments)
    if len(saves) == 2:  # after step 4, with the weights of checkpoint-000004 already written
        os.kill(os.getpid(), signal.SIGKILL)
    save(*arguments)

state.checkpoints.save_optimizer = save_and_die
Trainer(tiny_config(Path(sys.argv[1]), Path(sys.argv[2]), **WHOLE), reward=ColourReward()).run()
"""


def test_killed_while_saving_and_resumed_every_bit_is_the_same(
    folder: Path, whole: tuple[Trainer, Outcome], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-000002"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4  # two more than the checkpoint

    config = tiny_config(folder, out, resume_from_checkpoint="latest", **WHOLE)
    run = Trainer(config, reward=ColourReward())
    outcome = run.run()
    expected, expected_outcome = whole
    assert_same_bits(run.state, expected.state)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]

    def scores(run: Trainer) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows(run)]

    assert scores(run) == scores(expected)  # every step once, with the same numbers
    assert outcome.summary.before is not None
    assert expected_outcome.summary.before is not None
    assert torch.equal(outcome.summary.before.rewards, expected_outcome.summary.before.rewards)
    assert table_of(outcome) == table_of(expected_outcome)


def table_of(outcome: Outcome) -> list[str]:
    return str(outcome.summary).splitlines()[:2]


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(
    folder: Path, whole: tuple[Trainer, Outcome], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    config = tiny_config(folder, tmp_path / "my run", **WHOLE)
    stopped = Trainer(config, reward=AtCall(3, lambda _: signal.raise_signal(signal.SIGINT)))
    outcome = stopped.run()
    assert outcome.interrupted
    assert signal.getsignal(signal.SIGINT) is handler
    assert "finishing what is under way" in capfd.readouterr().err
    assert outcome.summary.result == tmp_path / "my run" / "checkpoint-000003"
    assert len(rows(stopped)) == 3
    assert outcome.resume_command == (
        f"leapalign align '{tmp_path / 'my run' / 'config.yaml'}' --resume_from_checkpoint latest"
    )
    resumed = Trainer(config.model_copy(update={"resume_from_checkpoint": "latest"}), reward=ColourReward())
    assert not resumed.run().interrupted
    assert_same_bits(resumed.state, whole[0].state)
    assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["usual", "ignored"])
def test_a_second_ctrl_c_ends_at_once(folder: Path, tmp_path: Path, before: Any) -> None:
    """A process that a script starts in the background begins with SIGINT ignored."""
    usual = signal.signal(signal.SIGINT, before)

    def twice(_: Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            Trainer(tiny_config(folder, tmp_path / "run"), reward=AtCall(1, twice)).run()
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_run_that_is_complete_can_be_made_longer(
    folder: Path, tmp_path: Path, whole: tuple[Trainer, Outcome]
) -> None:
    config = tiny_config(folder, tmp_path / "run", max_train_steps=4, **WHOLE)
    Trainer(config, reward=ColourReward()).run()
    longer = config.model_copy(update={"max_train_steps": 5, "resume_from_checkpoint": "latest"})
    run = Trainer(longer, reward=ColourReward())
    run.run()
    assert_same_bits(run.state, whole[0].state)


def test_a_changed_setting_is_told(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], whole: tuple[Trainer, Outcome]
) -> None:
    start = str(whole[0].output_dir / "checkpoint-000004")
    config = tiny_config(folder, tmp_path / "run", resume_from_checkpoint=start, alpha=0.5, learning_rate=1e-3)
    Trainer(config, reward=ColourReward()).run()
    told = " ".join(capfd.readouterr().err.split())
    assert "settings differ" in told
    assert "alpha 0.3 -> 0.5" in told
    assert "learning_rate" not in told


def test_old_checkpoints_go(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=2)
    Trainer(config, reward=ColourReward()).run()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-000004", "checkpoint-000005"]


@pytest.mark.parametrize(
    "split",
    [
        {"train_batch_size": 4, "microbatch": 2},
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"train_batch_size": 4, "gradient_checkpointing": True},
    ],
)
def test_however_the_batch_is_split_the_step_is_the_same(folder: Path, tmp_path: Path, split: dict[str, Any]) -> None:
    def first_step(name: str, **changes: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        run = Trainer(tiny_config(folder, tmp_path / name, max_train_steps=2, **changes), reward=ColourReward())
        run._load()
        run.state.step = 1
        grads, scores = run._gradients({})
        return grads, [scores]

    expected, scores = first_step("one", train_batch_size=4)
    found, found_scores = first_step("other", **split)
    # Sums of the same float32 terms in another order: the gradients' own rounding, 2^-24, through some 4 rollout steps
    # and 3 blocks of sums over 32 to 128 terms.
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 2e-5 * largest, name
    for key, value in scores[0].items():
        assert found_scores[0][key] == pytest.approx(value, rel=1e-5)


def test_accumulated_runs_end_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    def end(name: str, **changes: Any) -> TrainState:
        # With epsilon far above the gradients a step is proportional to them, as in plain descent: AdamW's own scaling
        # makes a full step of whatever rounding leaves of a gradient that is zero.
        config = tiny_config(folder, tmp_path / name, max_train_steps=3, adam_epsilon=1.0, learning_rate=0.1, **changes)
        run = Trainer(config, reward=ColourReward())
        run.run()
        assert isinstance(run.state, TrainState)
        return run.state

    whole, parts = end("one", train_batch_size=6), end("two", train_batch_size=3, gradient_accumulation_steps=2)
    moved = end("start", train_batch_size=6, seed=1)
    for name, weight in whole.parameters.items():
        # Three steps of 0.1 times a clipped gradient (norm at most 1) that agrees to 2e-5, and the weights' rounding.
        bound = 3 * 0.1 * 2e-5 + 2**-22 * float(weight.detach().abs().max())
        assert (parts.parameters[name] - weight).abs().max() <= bound, name
    assert any(not torch.allclose(moved.parameters[n], w, atol=1e-4) for n, w in whole.parameters.items())


@pytest.mark.parametrize("mode", ["paired", "held"])
def test_the_streamed_executor_makes_the_same_run(folder: Path, tmp_path: Path, mode: str) -> None:
    def run(name: str, **changes: Any) -> tuple[Trainer, Outcome]:
        # As in the test above: a step proportional to the gradients, so that their roundings stay what they are.
        changes |= {"max_train_steps": 3, "adam_epsilon": 1.0, "learning_rate": 0.1, "validation_prompts": PROMPTS[:2]}
        trainer = Trainer(tiny_config(folder, tmp_path / name, **changes), reward=ColourReward())
        return trainer, trainer.run()

    plain, expected = run("autograd", executor="autograd")
    streamed, found = run("streamed", streamed_mode=mode, microbatch=2)
    for ours, theirs in zip(rows(streamed), rows(plain), strict=True):
        assert ours.keys() - {"memory"} == theirs.keys()
        assert ours["seconds"].keys() == theirs["seconds"].keys()
        for key in ("reward", "loss", "d_j", "d_0", "active", "grad_norm"):
            # float32 rewards and gradients agree to 2e-5, and so do the weights' small steps
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    for name, weight in plain.state.parameters.items():
        bound = 3 * 0.1 * 2e-5 + 2**-22 * float(weight.detach().abs().max())
        assert (streamed.state.parameters[name] - weight).abs().max() <= bound, name
    for when in ("before", "after"):
        ours, theirs = getattr(found.summary, when), getattr(expected.summary, when)
        torch.testing.assert_close(ours.rewards, theirs.rewards, rtol=1e-4, atol=1e-5)
    loaded = dict(FluxTransformer2DModel.from_pretrained(found.summary.result).named_parameters())
    assert isinstance(streamed.state, TrainState)
    assert streamed.state.ema is not None
    assert all(torch.equal(loaded[name], average) for name, average in streamed.state.ema.tensors.items())


def test_a_streamed_run_that_was_stopped_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    changes = {"executor": "streamed", "microbatch": 2, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = Trainer(tiny_config(folder, tmp_path / "whole", **changes), reward=ColourReward())
    whole.run()
    config = tiny_config(folder, tmp_path / "run", **changes)
    stopped = Trainer(config, reward=AtCall(5, lambda _: signal.raise_signal(signal.SIGINT)))
    assert stopped.run().interrupted
    resumed = Trainer(config.model_copy(update={"resume_from_checkpoint": "latest"}), reward=ColourReward())
    assert not resumed.run().interrupted
    assert_same_bits(resumed.state, whole.state)
