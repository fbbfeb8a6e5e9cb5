"""A run obeys its plan, keeps it when it is resumed, and says what to change when memory runs out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.commands.main import main
from leapalign.config.loading import AlignConfig, save_config
from leapalign.engine.model import StreamedModel
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.workload import Budget
from leapalign.errors import UsageError
from leapalign.families.source import resolve_device
from leapalign.planning import run_plan as memory
from leapalign.planning.run_plan import RunPlan, memory_error, plan_of_run
from leapalign.planning.workload import kernels_of, plan_run
from leapalign.run.trainer import Trainer
from tests.families.tiny_pipeline import ColourReward, save_tiny_pipeline, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def planned(config: AlignConfig, monkeypatch: pytest.MonkeyPatch, plan: MemoryPlan) -> None:
    """Runs of this config get this plan."""
    given = RunPlan(plan, Budget(), "")
    monkeypatch.setattr("leapalign.run.trainer.plan_of_run", lambda *_, **__: given)


# ---- obeyed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["on", "off"])
def test_the_reward_has_the_device_as_planned(
    residency: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    on_device: list[int] = []

    class Watched(ColourReward):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            sizes.append(len(images))
            model = run.pipeline.transformer
            assert isinstance(model, StreamedModel)
            on_device.append(sum(slot.buffer.nbytes for slot in model.weights._slots))
            return super().__call__(images, prompts)

    config = tiny_config(folder, tmp_path / "run", max_train_steps=1, checkpointing_steps=9)
    plan = MemoryPlan(reward_microbatch=2, reward_residency=residency, checkpoint_reward=True, mode="held")
    planned(config, monkeypatch, plan)
    run = Trainer(config, reward=Watched())
    run.run()
    assert sizes == [2, 1], "three samples, two at once"
    assert [bool(count) for count in on_device] == [residency == "on"] * 2
    assert run.pipeline.vae.decoder.gradient_checkpointing
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert list(row["memory"]) == ["hoist", "rollout", "reward", "first leg", "weight gradients", "update"]


def test_latents_and_embeddings_wait_on_the_host(folder: Path, tmp_path: Path) -> None:
    run = Trainer(tiny_config(folder, tmp_path / "run"), reward=ColourReward())
    run._load()
    given = run.pipeline.conditioning(run.store.batch(run.train_prompts[:2]), 16, 3.5)
    assert run.pipeline.home == CPU and {value.device for value in given.values()} == {CPU}


@pytest.mark.parametrize("key", ["streamed_mode", "optimizer_device", "microbatch"])
def test_what_the_config_decides_the_plan_has(key: str, folder: Path, tmp_path: Path) -> None:
    values = {"streamed_mode": ("paired", "held"), "optimizer_device": ("host", "device"), "microbatch": (1, 2)}
    for value in values[key]:
        config = tiny_config(folder, tmp_path / "run", optimizer="adamw8bit", **{key: value})
        plan = plan_of_run(config, CPU, None).plan
        name = {"streamed_mode": "mode", "optimizer_device": "optimizer_on"}.get(key, key)
        assert getattr(plan, name) == value


# ---- kept ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_plan_while_it_fits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(folder, tmp_path / "run", optimizer="adamw8bit")
    first = plan_of_run(config, CPU, None)
    odd = replace(first.plan, microbatch=1, every=2)  # not what would be planned now
    assert odd != first.plan
    replace(first, plan=odd).save(_made(config))
    start = tmp_path / "run" / "checkpoint-000002"
    assert plan_of_run(config, CPU, start).plan == odd
    other = config.model_copy(update={"train_batch_size": 2})
    assert plan_of_run(other, CPU, start).plan != odd, "planned for another batch"
    monkeypatch.setattr(memory, "run_budget", lambda *_, **__: (Budget(1, 1), []))
    found = plan_of_run(config, CPU, start)
    assert found.plan == plan_run(config, CPU)
    assert "another plan than before (microbatch 1 -> " in found.notes[0] and "up to rounding" in found.notes[0]


def _made(config: AlignConfig) -> Path:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    return folder


def test_a_plan_that_cannot_be_read_is_made_again(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run")
    expected = plan_of_run(config, CPU, None).plan
    path = _made(config) / "plan.json"
    for text in ("", "[]", "{}", '{"workload": 3, "vram": null, "ram": null, "mode": "neither"}'):
        path.write_text(text)
        assert plan_of_run(config, CPU, None).plan == expected


def test_a_run_leaves_its_plan(folder: Path, tmp_path: Path) -> None:
    run = Trainer(tiny_config(folder, tmp_path / "run", max_train_steps=1), reward=ColourReward())
    run.run()
    saved = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert run.planned is not None
    assert saved["phases"] and saved["peak_host_bytes"] == run.planned.plan.peak_host_bytes
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["memory"].keys() >= {phase["name"] for phase in saved["phases"]}
    for phase in saved["phases"]:
        assert row["memory"][phase["name"]]["planned_host_bytes"] == phase["host_bytes"]
        assert row["memory"][phase["name"]]["host_bytes"] > 0


# ---- kernels and attention -----------------------------------------------------------------------------------------


def test_kernels_are_used_as_the_plan_says(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for on a CPU their references run, which is told; the run is the same up to rounding."""
    rewards = {}
    for kernels in ("auto", "torch", "triton"):
        run = Trainer(
            tiny_config(folder, tmp_path / kernels, max_train_steps=2, kernels=kernels), reward=ColourReward()
        )
        run.run()
        model: Any = run.pipeline.transformer
        assert run.planned is not None
        assert run.planned.plan.kernels == ("triton" if kernels == "triton" else "torch")
        assert model.backbone.fused == (kernels == "triton")
        rows = [json.loads(line) for line in (tmp_path / kernels / "metrics.jsonl").open()]
        rewards[kernels] = [row["reward"] for row in rows]
        told = "its operators' references in torch run" in " ".join(capsys.readouterr().err.split())
        assert told == (kernels == "triton")
    assert rewards["auto"] == rewards["torch"]
    assert rewards["triton"] == pytest.approx(rewards["torch"], rel=1e-4)  # a step of Adam amplifies rounding


def test_triton_is_missed_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run", kernels="triton")
    automatic = config.model_copy(update={"kernels": "auto"})
    gpu = torch.device("cuda", 0)
    assert [kernels_of(each, gpu) for each in (config, automatic)] == ["triton", "triton"]
    assert [kernels_of(automatic, device) for device in (None, CPU)] == ["triton", "torch"]  # None: another machine's
    monkeypatch.setattr("leapalign.kernels.dispatch.triton", None)
    monkeypatch.setattr("leapalign.planning.workload.triton", None)
    assert kernels_of(automatic, gpu) == "torch"
    with pytest.raises(UsageError, match="kernels = triton, but Triton is not installed; pip install triton, or use"):
        kernels_of(config, gpu)


@pytest.mark.parametrize("executor", ["streamed", "autograd"])
def test_an_attention_backend_that_cannot_run_ends_in_one_line(
    executor: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(tiny_config(folder, tmp_path / "run", executor=executor, attention="cudnn"), tmp_path / "settings")
    assert main(["align", str(tmp_path / "settings" / "config.yaml")]) == 2
    told = capsys.readouterr().err.strip()
    assert told == ("leapalign: error: attention = cudnn runs on a CUDA GPU, not on cpu: choose attention = native")
    assert not (tmp_path / "run").exists()


# ---- run out -------------------------------------------------------------------------------------------------------


def test_a_budget_that_is_too_small_ends_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(tiny_config(folder, tmp_path / "run", ram="1MiB"), tmp_path / "settings")
    assert main(["align", str(tmp_path / "settings" / "config.yaml")]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("leapalign: error: ") and told.count("\n") == 0
    assert "ram = 1MiB" in told and "give ram " in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), ["out of device memory", "checkpoint latest", "--vram "]),
        (RuntimeError("cannot lock it: raise it, or pass pin=False for slower copies"), ["cannot lock", "raise it"]),
        (MemoryError("the host has no room"), ["out of host memory", "no room", "--use_ema false or --clip block"]),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate"), ["out of host memory", "--train_batch_size"]),
    ],
)  # fmt: skip
def test_out_of_memory_ends_with_the_setting_to_change(
    error: BaseException, parts: list[str], folder: Path, tmp_path: Path
) -> None:
    class Full(ColourReward):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            raise error

    run = Trainer(tiny_config(folder, tmp_path / "run", optimizer="adamw8bit"), reward=Full())
    with pytest.raises(UsageError) as told:
        run.run()
    for part in parts:
        assert part in str(told.value)
    assert run.planned is not None
    if "--vram" in str(told.value):
        given = str(told.value).rpartition("--vram ")[2].split()[0]
        assert 0 < Budget(given).device_bytes < run.planned.plan.peak_device_bytes
    assert "\n" not in str(told.value)


def test_other_errors_and_other_executors(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run", executor="autograd")
    assert memory_error(RuntimeError("shapes differ"), config, None) is None
    found = memory_error(torch.OutOfMemoryError("CUDA out of memory"), config, None)
    assert found is not None and "--executor streamed" in str(found)
    found = memory_error(MemoryError("full"), config, None)
    assert found is not None and "adamw8bit" not in str(found), "autograd has no such optimizer"


@pytest.mark.parametrize(("vram", "fraction"), [(None, 1.0), ("9GiB", (9 - 0.625) / 16), ("99GiB", 1.0)])
def test_the_allocator_is_held_to_what_the_config_gives(
    vram: str | None, fraction: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch wants a device with an index here, which `resolve_device` gives."""
    caps: list[tuple[float, int]] = []
    total = type("Properties", (), {"total_memory": 16 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (15 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *cap: caps.append(cap), raising=False)
    device = resolve_device("cuda")
    found = plan_of_run(tiny_config(folder, tmp_path / "run", device="cuda", vram=vram), device, None)
    ((cap, index),) = caps
    assert index == 1
    assert cap == pytest.approx(fraction if vram != "99GiB" else (15.25 * 0.97 - 0.625) / 16)
    assert found.budget.device_bytes <= 15.25 * 2**30 * 0.97
