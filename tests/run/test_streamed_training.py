"""Runs with the 8-bit AdamW: the same bits wherever they run and after any kill, and what their steps and files are."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from leapalign.engine.memory.checkpoint import list_checkpoints
from leapalign.engine.model import StreamedModel
from leapalign.engine.streaming.gradients import Gradients
from leapalign.errors import UsageError
from leapalign.kernels.host import native as host
from leapalign.planning import run_plan as memory
from leapalign.planning.workload import plan_run
from leapalign.run.streamed_state import StreamedState
from leapalign.run.trainer import Trainer
from tests.families.tiny_pipeline import PROMPTS, ColourReward, save_tiny_pipeline, tiny_config
from tests.run.training import AtCall

EIGHT_BIT: dict[str, Any] = {"executor": "streamed", "optimizer": "adamw8bit", "weight_dtype": "bf16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def trainer(folder: Path, out: Path, reward: Any = None, **changes: Any) -> Trainer:
    return Trainer(tiny_config(folder, out, **{**EIGHT_BIT, **changes}), reward=reward or ColourReward())


def trained(folder: Path, out: Path, reward: Any = None, **changes: Any) -> Trainer:
    run = trainer(folder, out, reward, **changes)
    run.run()
    return run


def rows(run: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]


def settled(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without what the machine adds to it."""
    return {key: value for key, value in row.items() if key not in ("seconds", "memory")}


def everything(run: Trainer) -> dict[str, Tensor]:
    """Weights and every state, average included, by name: copies."""
    state = run.state
    assert isinstance(state, StreamedState)
    state.model.streamer.drain()
    found = {name: parameter.detach().clone() for name, parameter in state.parameters.items()}
    for name, parameter in state.parameters.items():
        for kind, value in state.optimizer.state[parameter].items():
            found[f"{name}/{kind}"] = value.clone() if isinstance(value, Tensor) else torch.tensor(value)
    return found


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": "global", "gradient_accumulation_steps": 2, "train_batch_size": 2, "validation_prompts": PROMPTS[:2]},
        {"clip": "block", "streamed_mode": "held", "master": "residual", "optimizer_device": "device"},
        {"clip": "none", "weight_dtype": "float32"},
        {"clip": "block", "master": "float32", "use_ema": False},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values() if isinstance(value, str)),
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    passes = changes.get("gradient_accumulation_steps", 1)
    changes = {**changes, "max_train_steps": 3, "validation_steps": 1}
    whole = trained(folder, tmp_path / "whole", **changes)
    stopped = AtCall(1 * passes + 1, lambda _: signal.raise_signal(signal.SIGINT))
    assert trainer(folder, tmp_path / "run", stopped, **changes).run().interrupted
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-000002"]
    resumed = trained(folder, tmp_path / "run", resume_from_checkpoint="latest", **changes)
    assert_same_bits(everything(resumed), everything(whole))
    for ours, theirs in zip(rows(resumed), rows(whole), strict=True):
        assert settled(ours) == settled(theirs)


def test_a_checkpoint_of_another_format_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path / "run", max_train_steps=2)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for changes, message in (
        ({"optimizer": "adamw", "weight_dtype": "float32"}, "optimizer = adamw, but .*go on with optimizer adamw8bit"),
        ({"weight_dtype": "float32"}, "weight_dtype = float32, but .* holds the states of weight_dtype = bf16"),
        ({"master": "residual"}, "master = residual"),
    ):
        with pytest.raises(UsageError, match=message):
            trainer(folder, tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=4, **changes).run()
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_where_the_update_runs_may_change_on_the_way_and_an_average_may_begin(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = trained(folder, tmp_path / "whole", max_train_steps=3, use_ema=False, clip="block")
    trained(folder, tmp_path / "run", max_train_steps=2, use_ema=False, clip="block")
    changes = {"optimizer_device": "device", "resume_from_checkpoint": "latest", "clip": "block"}
    capfd.readouterr()
    resumed = trained(folder, tmp_path / "run", max_train_steps=3, **changes)
    told = " ".join(capfd.readouterr().err.split())
    assert "has no average; it starts at the weights of step 2" in told
    assert "use_ema False -> True" in told
    assert "optimizer_device" not in told
    found = everything(resumed)
    assert_same_bits({name: value for name, value in found.items() if not name.endswith("/ema")}, everything(whole))


# ---- where it runs -------------------------------------------------------------------------------------------------


def test_same_bits_with_any_instruction_set_and_without_the_native_module(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"clip": "block", "max_train_steps": 2, "optimizer_device": "host", "use_ema": True}
    found = []
    for name in host.instruction_sets():
        with host.instruction_set(name):
            found.append(everything(trained(folder, tmp_path / name, **changes)))
    monkeypatch.setattr(host, "native", None)
    host._say_once.cache_clear()
    found.append(everything(trained(folder, tmp_path / "torch", **changes)))
    for other in found[1:]:
        assert_same_bits(other, found[0])
    assert ["native module is missing" in record.message for record in caplog.records].count(True) == 1


def test_threads_of_the_update_on_the_host(folder: Path, tmp_path: Path) -> None:
    changes = {"clip": "block", "max_train_steps": 2, "optimizer_device": "host"}
    try:
        one = trained(folder, tmp_path / "one", host_threads=1, **changes)
        pinned = {"host_threads": 3, "host_cores": [min(os.sched_getaffinity(0))]}
        three = trained(folder, tmp_path / "three", **pinned, **changes)
    finally:
        host.configure()
    assert_same_bits(everything(one), everything(three))
    with pytest.raises(UsageError, match=r"host_cores = \[5000\]: core 5000 is not among .*leave host_cores out"):
        trainer(folder, tmp_path / "run", host_cores=[5000], **changes).run()


@pytest.mark.parametrize(("clip", "mode"), [("global", "held"), ("block", "paired")])
def test_same_bits_on_host_and_device_and_with_any_slots(
    clip: str, mode: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for place, slots in (("host", 2), ("device", 2), ("device", 3), ("host", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(memory, "plan_run", lambda *a, slots=slots, **k: replace(plan_run(*a, **k), slots=slots))
            changes = {"clip": clip, "streamed_mode": mode, "optimizer_device": place, "max_train_steps": 2}
            changes |= {"checkpointing_steps": 9, "train_batch_size": 2}
            run = trained(folder, tmp_path / f"{place}-{slots}", master="residual", **changes)
        assert isinstance(run.pipeline.transformer, StreamedModel)
        assert run.pipeline.transformer.plan.slots == slots
        found.append(everything(run))
    for other in found[1:]:
        assert_same_bits(other, found[0])


# ---- the step ------------------------------------------------------------------------------------------------------

# With epsilon far above the gradients a step is proportional to them: AdamW's own scaling makes a full step of whatever
# rounding leaves of a gradient that is zero. One step, because codes of later moments may differ by one.
PROPORTIONAL = {"adam_epsilon": 1.0, "learning_rate": 0.1, "max_train_steps": 1, "weight_dtype": "float32"}


def assert_close_weights(found: Trainer, expected: Trainer) -> None:
    """Gradients of norm at most 1 that agree to 2e-5, times the learning rate, and the weights' own rounding."""
    moved = False
    for name, weight in expected.state.parameters.items():
        bound = 0.1 * 2e-5 + 2**-22 * float(weight.detach().abs().max())
        assert (found.state.parameters[name] - weight).abs().max() <= bound, name
        moved = moved or bool((weight - expected_start(expected, name)).abs().max() > 100 * bound)
    assert moved


def expected_start(run: Trainer, name: str) -> Tensor:
    folder = Path(run.config.pretrained_model_name_or_path) / "transformer"
    weights: Tensor = dict(FluxTransformer2DModel.from_pretrained(folder).named_parameters())[name].detach()
    return weights


@pytest.mark.parametrize(
    "split",
    [
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"train_batch_size": 1, "gradient_accumulation_steps": 4, "streamed_mode": "held"},
        {"train_batch_size": 4, "microbatch": 2, "clip": "none", "max_grad_norm": 1e-9},
    ],
)
def test_however_the_batch_is_split_the_step_is_the_same(folder: Path, tmp_path: Path, split: dict[str, Any]) -> None:
    settings = {**PROPORTIONAL, "max_grad_norm": 1e9}  # the gradients themselves
    expected = trained(folder, tmp_path / "one", train_batch_size=4, **settings)
    found = trained(folder, tmp_path / "other", **{**settings, **split})
    assert_close_weights(found, expected)
    for key in ("reward", "loss", "d_j", "d_0", "grad_norm"):
        assert rows(found)[0][key] == pytest.approx(rows(expected)[0][key], rel=2e-5), key


def test_the_first_step_is_that_of_float32_adamw(folder: Path, tmp_path: Path) -> None:
    """It uses the moments before they become codes."""
    expected = trained(folder, tmp_path / "adamw", **{**PROPORTIONAL, "optimizer": "adamw"})
    found = trained(folder, tmp_path / "adamw8bit", **PROPORTIONAL)
    assert_close_weights(found, expected)
    assert rows(found)[0]["grad_norm"] == pytest.approx(rows(expected)[0]["grad_norm"], rel=2e-5)


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_batch_above_the_threshold_is_a_step_with_gradient_zero(place: str, folder: Path, tmp_path: Path) -> None:
    """The moments decay and the weights go on, as with adamw; held or delivered it is the same."""
    changes = {"threshold": 0.0, "max_train_steps": 2, "optimizer_device": place, "train_batch_size": 2}
    ends = []
    for clip in ("global", "block"):
        run = trainer(folder, tmp_path / clip, AtCall(1, lambda rewards: rewards - 2), clip=clip, **changes)
        run._load()
        first = run._train_step()
        assert (first["active"], first["grad_norm"] > 0) == (1, True)
        assert isinstance(run.state, StreamedState)
        state = run.state
        state.model.streamer.drain()
        for unit in state.model.store.units:  # the first step's sums are rounded where they are held
            for number, kind in enumerate(("weights", "ema", "m", "m_absmax", "v", "v_absmax")):
                region = state.model.store.region(unit, kind)
                region.copy_(torch.arange(region.numel()) % 97 * (1 if number in (2, 4) else 1e-3) + 1e-3)
            state.model.weights_changed(unit)
        before = everything(run)
        second = run._train_step()
        assert (second["active"], second["grad_norm"], second["skipped"]) == (0, 0, False)
        assert (state.optimizer.steps, state.skipped) == (2, 0)
        ends.append(everything(run))
        assert not [name for name in state.parameters if torch.equal(before[name], ends[-1][name])]
        for name in state.parameters:
            assert (ends[-1][f"{name}/m_absmax"] < before[f"{name}/m_absmax"]).all(), name
    assert_same_bits(ends[0], ends[1])


# ---- what is not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["global", "block"])
def test_a_reward_that_is_not_finite_changes_nothing(clip: str, folder: Path, tmp_path: Path) -> None:
    snapshots: list[dict[str, Tensor]] = []

    class Watched(Trainer):
        def _train_step(self) -> dict[str, Any]:
            snapshots.append(everything(self))
            return super()._train_step()

    passes = 2 if clip == "global" else 1  # the second pass of step 2: what the first has held is discarded
    bad = AtCall(2 * passes, lambda rewards: rewards * math.nan)
    changes = {**EIGHT_BIT, "clip": clip, "max_train_steps": 3, "gradient_accumulation_steps": passes}
    run = Watched(tiny_config(folder, tmp_path / "run", **changes), reward=bad)
    run.run()
    assert [row["skipped"] for row in rows(run)] == [False, True, False]
    assert_same_bits(snapshots[1], snapshots[2])
    assert any(not torch.equal(snapshots[2][name], value) for name, value in everything(run).items())
    state = run.state
    assert isinstance(state, StreamedState)
    assert (state.step, state.skipped, state.optimizer.steps) == (3, 1, 2)


@pytest.mark.parametrize("mode", ["paired", "held"])
def test_a_cotangent_that_is_not_finite_is_found_before_the_first_update(
    mode: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(folder, tmp_path / "run", clip="block", streamed_mode=mode)
    run._load()
    before = everything(run)
    vjp = StreamedModel.vjp

    def broken(self: StreamedModel, legs: Any, **options: Any) -> Any:
        found = vjp(self, legs, **options)
        for gradients in found:
            for gradient in gradients.values():
                gradient[1] = math.inf
        return found

    monkeypatch.setattr(StreamedModel, "vjp", broken)
    row = run._train_step()
    assert row["skipped"]
    assert "samples [1]" in row["reason"]
    assert_same_bits(everything(run), before)


class AtStep(ColourReward):
    """Not finite in one training step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.run: Trainer | None = None

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        rewards = super().__call__(images, prompts)
        assert self.run is not None
        return rewards * (math.nan if torch.is_grad_enabled() and self.run.state.step == self.step else 1)


@pytest.mark.parametrize(
    ("checkpointing", "step", "master"),
    [(2, 3, "stochastic"), (9, 3, "residual"), (9, 1, "float32"), (2, 5, "residual")],
)
def test_a_step_that_is_found_broken_after_the_first_update_is_left_out_whole(
    checkpointing: int, step: int, master: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its reward had not been finite: the run goes back to its last checkpoint, or to its start."""
    changes = {"clip": "block", "checkpointing_steps": checkpointing, "master": master}
    reward = AtStep(step)
    expected = reward.run = trainer(folder, tmp_path / "expected", reward, **changes)
    expected.run()
    deliver = Gradients.deliver
    run = trainer(folder, tmp_path / "run", **changes)

    def broken(self: Gradients, unit: str, names: Any, sink: Any) -> None:
        if unit == "transformer_blocks.0" and run.state.step == step:
            assert self._buffer is not None
            self._buffer.tensor.view(torch.float32).fill_(math.nan)
        deliver(self, unit, names, sink)

    monkeypatch.setattr(Gradients, "deliver", broken)
    run.run()
    assert_same_bits(everything(run), everything(expected))
    assert [(row["step"], row["skipped"]) for row in rows(run)] == [(n, n == step) for n in range(1, 6)]
    assert "the gradient of transformer_blocks.0 is not finite" in rows(run)[step - 1]["reason"]
    assert run.state.skipped == 1
    others = [[settled(row) for row in rows(each) if row["step"] != step] for each in (run, expected)]
    assert others[0] == others[1]


# ---- files ---------------------------------------------------------------------------------------------------------


def test_the_result_is_the_average_and_loads_as_a_stock_transformer(folder: Path, tmp_path: Path) -> None:
    run = trained(folder, tmp_path / "run", max_train_steps=2)
    expected = everything(run)
    kinds = {"transformer": "/ema", "checkpoint-000002/transformer": "", "checkpoint-000002/transformer_ema": "/ema"}
    for part, kind in kinds.items():
        loaded = FluxTransformer2DModel.from_pretrained(run.output_dir / part, torch_dtype=torch.bfloat16)
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter.flatten(), expected[f"{name}{kind}"].flatten()), (part, name)
    assert any(not torch.equal(expected[name].flatten(), expected[f"{name}/ema"]) for name in run.state.parameters)
    own = json.loads((run.output_dir / "transformer" / "config.json").read_text())
    stock = json.loads((folder / "transformer" / "config.json").read_text())
    assert {k: v for k, v in own.items() if k != "_name_or_path"} == {
        k: v for k, v in stock.items() if k != "_name_or_path"
    }


def test_inside_the_average_the_model_computes_with_it_and_then_as_before(folder: Path, tmp_path: Path) -> None:
    run = trained(folder, tmp_path / "run", max_train_steps=2)
    before = everything(run)
    with run.state.averaged():
        inside = everything(run)
        assert isinstance(run.pipeline.transformer, StreamedModel)
        averaged = run._validate()
    assert averaged is None  # no validation prompts
    for name in run.state.parameters:
        assert torch.equal(inside[name].flatten(), before[f"{name}/ema"].flatten()), name
        assert torch.equal(inside[f"{name}/ema"].flatten(), before[name].flatten()), name
    assert_same_bits(everything(run), before)


SAVING = """
import sys
from pathlib import Path
import torch
from diffusers import FluxTransformer2DModel
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.model import StreamedModel
from leapalign.config.keys import AlignConfig
from leapalign.run.streamed_state import StreamedState

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

with torch.device("meta"):
    meta = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=8, attention_head_dim=128,
        joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(16, 56, 56)).to(torch.bfloat16)
model = StreamedModel(meta, MemoryPlan(), device="cpu")
config = AlignConfig(pretrained_model_name_or_path="none", executor="streamed", optimizer="adamw8bit",
    weight_dtype="bf16", checkpoints_total_limit=1)
state = StreamedState(model, config)
kinds = ["weights", "m", "m_absmax", "v", "v_absmax", "ema"]
regions = [model.store.region(unit, kind) for unit in model.store.units for kind in kinds]
for region in regions:
    region.fill_(1)
total = sum(region.nbytes for region in regions)
largest = max(parameter.nbytes for parameter in state.parameters.values())
before = memory("VmRSS")
assert memory("VmHWM") - before < 16e6, "something was larger before"
assert before > total > 300e6, (before, total)
state.step = 1
checkpoint = state.save(Path(sys.argv[1]))
state.export(Path(sys.argv[1]) / "transformer")
state.restore(checkpoint)
growth = memory("VmHWM") - before
assert growth <= largest + 32e6, (growth, largest, total)
print(f"{growth / 1e6:.1f} MB over {total / 1e6:.0f} MB")
"""


def test_saving_exporting_and_restoring_make_no_copy(tmp_path: Path) -> None:
    """Of weights, 8-bit states and average of 55 million parameters: one tensor and 32 MB more at most."""
    run = subprocess.run(
        [sys.executable, "-c", SAVING, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
