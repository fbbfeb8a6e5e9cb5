"""`bench throughput`: the ways compute the same, their numbers agree with each other, and what does not fit is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import record
from bench.__main__ import main, parser
from bench.speed import device_variants, random_models, step_timing, step_variants, throughput
from bench.speed.device_variants import Plain, Resident
from bench.speed.movement import watched
from bench.speed.step_timing import over_plan, rollout_steps
from bench.speed.step_variants import Step, Task, planner_of
from leapalign.engine.ledger import Measured
from leapalign.engine.streaming.streamer import Streamer
from leapalign.gradients import alignment_gradients

CPU = torch.device("cpu")


def task(**changes: Any) -> Task:
    sizes = random_models.tiny()
    settings = {"resolution": sizes.resolution, "batch": 3, "steps": 3, "device": CPU, "microbatch": 1, **changes}
    return Task(sizes, **settings)


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What `--tiny --json` gives."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as out:
        assert main(["throughput", "--tiny", "--json", "--ways", "streamed,resident"]) == 0
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def test_rates_follow_from_the_seconds(printed: dict[str, Any]) -> None:
    assert printed["device"] == "cpu" and printed["settings"]["model"] == "tiny"
    assert [row["way"] for row in printed["ways"]] == ["streamed, 3850KiB", "resident"]
    for row in printed["ways"]:
        total, phases = row["seconds"]["total"], sum(v for k, v in row["seconds"].items() if k != "total")
        assert phases == pytest.approx(total)
        assert row["images_per_s"] * total == pytest.approx(printed["settings"]["batch"])
        assert row["flops_per_s"] * total == pytest.approx(row["flops"])
        assert row["of_matmul"] * printed["matmul_flops_per_s"] == pytest.approx(row["flops_per_s"])
        assert row["steps"] == 3 and row["timed"] == 1 and row["spread"] is None
        assert all(share > 0 for share in row["weights_changed"])
        assert row["losses"][0] == pytest.approx(49.3, rel=0.05)  # weight times threshold: much the same for all


def test_the_streamed_row_says_what_was_planned(printed: dict[str, Any]) -> None:
    row = printed["ways"][0]
    assert row["planned_peak_bytes"] <= row["cap_bytes"] == 3850 * 1024
    assert row["plan"]["microbatch"] == row["microbatch"] == 1 and row["over_plan"] == []
    # S + 2 · 4 forwards for either: the streamed one keeps the leaps' inputs, and differentiates one of them twice
    assert row["flops"] == pytest.approx(printed["ways"][1]["flops"], rel=0.25)
    assert {"h2d_bytes", "d2h_bytes", "exposed_seconds", "blocked_seconds", "overlap"} < row["movement"].keys()
    assert 0 < row["movement"]["h2d_bytes"] <= row["copies"]["h2d_bytes"] + row["copies"]["d2h_bytes"]
    assert printed["ways"][1]["movement"] is None


def test_the_plain_way_has_the_gradient_of_algorithm_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 and in two microbatches: sums in another order."""
    monkeypatch.setattr(step_variants, "DTYPE", torch.float32)
    way = Plain(task())
    way.microbatch = 2
    monkeypatch.setattr(way, "_update", lambda: None)
    loss = way.step(0, 3).loss
    expected = alignment_gradients(**way._given(0, 3), executor="reference")
    assert loss == pytest.approx(float(expected.loss), rel=1e-5)
    found = {name: p.grad for name, p in way.pipeline.transformer.named_parameters() if p.grad is not None}
    assert distance(found, expected.grads) < 2e-5  # as far as executors may be apart


def test_the_resident_way_steps_by_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_variants, "DTYPE", torch.float32)
    way = Resident(task())
    monkeypatch.setattr(way, "_update", lambda: None)
    way.step(0, 3)
    expected = alignment_gradients(**way._given(0, 3), executor="reference")
    found = {name: p.grad for name, p in way.pipeline.transformer.named_parameters() if p.grad is not None}
    assert distance(found, expected.grads) < 2e-5


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5)


def test_what_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is refused, and memory that runs out whatever the microbatch, are rows as others are."""
    taken: list[int | None] = []

    class Large(Plain):
        def step(self, number: int, steps: int) -> Step:
            taken.append(self.microbatch)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(throughput, "Plain", Large)
    monkeypatch.setattr(throughput, "card_bytes", lambda device: 80 * 2**30)
    measurement = throughput.Measurement(task(), ("streamed", "plain"), ("1MiB",), None, 1)
    refused, large = measurement.rows()
    assert taken == [3, 1] and large["out_of_memory_bytes"] == 80 * 2**30
    assert throughput.told(large) == "plain: out of memory at 80.00GiB"
    assert "vram = 993.28KiB is too little: the step needs " in throughput.told(refused)  # 3 % are for gaps
    lines = throughput.table({"settings": {"steps": 3}, "device": "cpu", **measurement.rates, "ways": [refused, large]})
    assert "plain                 out of memory at 80.00GiB" in lines.splitlines()


def test_a_rollout_is_shortened_to_the_time_there_is() -> None:
    step = Step({"rollout": 4.0, "vjp": 6.0}, 0.0)  # a second an evaluation
    assert rollout_steps(step, 4, 25, 31.0) == rollout_steps(step, 4, 25, float("inf")) == 25
    assert rollout_steps(step, 4, 25, 20.5) == 14
    assert rollout_steps(step, 4, 25, 1.0) == 4


def test_phases_above_the_plan_are_named() -> None:
    memory = {"rollout": Measured(11), "reward": Measured(9), "update": Measured(None)}
    planned = {phase: {"device_bytes": 10} for phase in memory}
    assert over_plan(memory, planned) == ["rollout"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ways", "resident,fast"], "ways=fast is unknown: choose from streamed, resident, plain"),
        (["--vram", "24GiB,much"], "vram = much: give a size"),
        (["--blocks", "5"], "blocks=5: give two numbers"),
        (["--steps", "1"], "steps=1 must be at least 2"),
        (["--resolution", "20"], "resolution=20 must be a multiple of 8 pixels"),
        (["--repeats", "0"], "repeats=0 must be at least 1"),
        (["--fast"], "unknown argument --fast"),
        (["--model", "flux1_dev"], "model=flux1_dev needs a CUDA GPU, and torch sees none"),
    ],
)
def test_wrong_settings(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["throughput", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench throughput: error: ") and message in line


def test_the_packaged_model_is_streamed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the smaller of its caps blocks come and go in every step; under the larger they stay."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measurement = throughput._measurement(parser(["throughput"]).parse_args(["throughput"]))
    assert measurement.names() == ["streamed, 8MiB", "streamed, 1GiB", "resident", "plain"]
    planner = planner_of(measurement.task, measurement._machine)
    plans = []
    monkeypatch.setattr(
        step_variants, "Streamed", lambda task, planner, budget, **more: plans.append((planner.plan(budget), more))
    )
    for limit in (8 * 2**20, 2**30):
        step_variants.streamed(measurement.task, planner, limit, None)
        assert plans[-1][1]["held_to"] == limit
        assert max(phase.device_bytes for phase in plans[-1][0].phases) <= 0.97 * limit
    assert plans[0][0].resident != "all" and plans[1][0].resident == "all"


def test_a_cap_above_the_card_is_refused_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "card_bytes", lambda device: 24 * 2**30)
    monkeypatch.setattr(throughput, "measured", None)
    (row,) = throughput.Measurement(task(), ("streamed",), ("48GiB",), None, 1).rows()
    assert row["refused"] == "the card has 24.00GiB"


def test_all_of_a_card_is_the_cap_that_it_is_sold_as() -> None:
    """One of 24 GiB shows a little less."""
    cap, shown = 24 * 2**30, int(23.6 * 2**30)
    assert step_variants.cap_on(shown, cap) == shown and step_variants.cap_on(0, cap) == cap == step_variants.cap_on(
        2 * cap, cap
    )
    with pytest.raises(ValueError, match="the card has 16.00GiB"):
        step_variants.cap_on(16 * 2**30, cap)


def test_a_way_that_fails_takes_no_row_along(monkeypatch: Any, tmp_path: Any, capsys: Any) -> None:
    """Another error than of memory: it is in the file, in the table and, with its traceback, in the log."""

    class Broken(Plain):
        def step(self, number: int, steps: int) -> Step:
            raise ValueError("of us\nmore of it")

    monkeypatch.setattr(throughput, "Resident", Broken)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert main(["throughput", "--tiny", "--ways", "resident,plain", "--output", "found"]) == 1
    broken, plain = json.loads((tmp_path / "found.json").read_text())["ways"]
    assert broken["failed"] == "ValueError: of us" and plain["seconds"]["total"] > 0
    captured = capsys.readouterr()
    assert "resident              failed: ValueError: of us" in captured.out.splitlines()
    assert "Traceback" in captured.err

    class Idle(Plain):
        def sample(self) -> list[Tensor]:
            return [torch.zeros(3)]

    monkeypatch.setattr(throughput, "Resident", Idle)
    assert main(["throughput", "--tiny", "--ways", "resident", "--output", "found"]) == 1
    (idle,) = json.loads((tmp_path / "found.json").read_text())["ways"]
    assert idle["faults"] == ["weights have not changed"] and idle["seconds"]["total"] > 0
    assert "FAULT: weights have not changed" in capsys.readouterr().err

    def cannot(device: torch.device) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(step_timing, "collect", cannot)  # a device that is broken
    assert step_timing.outcome(lambda: 1 // 0, CPU, 0) == {  # type: ignore[arg-type, return-value]
        "failed": "ZeroDivisionError: integer division or modulo by zero"
    }


def test_bitsandbytes_without_its_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import succeeds and its first step fails: the trial step finds it."""

    class Theirs(torch.optim.SGD):
        broken = True

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise AttributeError("'NoneType' object has no attribute 'cadam_8bit'")
            return super().step(closure)

    optim = ModuleType("bitsandbytes.optim")
    monkeypatch.setattr(optim, "AdamW8bit", Theirs, raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    monkeypatch.setattr(Theirs, "broken", False)
    assert device_variants.their_adamw(CPU) is Theirs
    monkeypatch.setattr(Theirs, "broken", True)
    monkeypatch.setattr(device_variants, "their_adamw", lambda device, tried=device_variants.their_adamw: tried(CPU))
    found, name = device_variants.eight_bit_adamw(torch.nn.Linear(2, 2), torch.device("cuda"))
    assert type(found) is torch.optim.AdamW
    assert name.startswith("AdamW of torch for bitsandbytes', which is not to be had: 'NoneType' object")


# ---- copies --------------------------------------------------------------------------------------------------------


def test_copies_and_waits_are_watched() -> None:
    """Every copy sleeps for a while first, and compute needs what the first one brings: it cannot be quicker."""
    streamer = Streamer(CPU, delay=lambda name: 0.02)
    slot, region = streamer.slot(64), streamer.wrap(torch.arange(64, dtype=torch.uint8))
    with watched(streamer) as watch:
        streamer.load(slot, region)
        with streamer.use(slot):
            slot.tensor.add_(1)
        streamer.store(region, slot, [(region.tensor[:32], slot.tensor[:32])])
        streamer.settle(region)
    found = watch.movement()
    assert (found.h2d_bytes, found.d2h_bytes) == (64, 32)
    assert found.h2d_seconds >= 0.02 and found.d2h_seconds >= 0.02
    assert found.exposed_seconds > 0 and found.blocked_seconds > 0 and found.overlap is not None
    assert torch.equal(region.tensor[:33], torch.tensor([*range(1, 33), 32], dtype=torch.uint8))
    streamer.load(slot, region)  # no longer watched
    assert (watch._streamer.copied, len(watch._copies["in"])) == ({"in": 128, "out": 32}, 1)
    streamer.close()
