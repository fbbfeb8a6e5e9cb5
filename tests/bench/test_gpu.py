"""`bench gpu`: broken stages take nothing along, time is kept, and what is there is not measured again."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import sources
from bench.__main__ import main
from bench.gpu import command as gpu
from bench.gpu import correctness as gpu_correctness
from bench.gpu import file as gpu_file
from bench.gpu import stages as gpu_stages
from bench.gpu.command import Events, MachineError, Measurement, Stage
from bench.gpu.stages import Context
from bench.gpu.text import table
from bench.kernels import cases as kernel_cases
from bench.kernels import command as kernels
from bench.memory.trajectory_points import METHODS
from bench.report.memory_tables import trajectory as trajectory_table
from bench.report.step_tables import parts
from bench.speed import step_variants, throughput

CPU = torch.device("cpu")


def toy(name: str, seconds: float = 60, least: float = 0) -> Stage:
    return Stage(f"tests.bench.gpu_toy_stages:{name}", least, seconds)


def ran(stages: dict[str, Stage], *, minutes: float = 20, **options: Any) -> dict[str, Any]:
    measurement = Measurement(stages, minutes, tiny=True, **options)
    measurement.run()
    return measurement.result


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of stages of which one raises, one finds something wrong, one kills its process, and one never ends."""
    names = {"first": "fine", "broken": "broken", "half": "halfway", "crash": "dies", "hang": "hangs", "last": "fine"}
    stages = {name: toy(function, seconds=0.5 if name == "hang" else 60) for name, function in names.items()}
    path = tmp_path_factory.mktemp("gpu") / "found.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_GRACE", 0.0)
        found = ran(stages, path=path)
    assert json.loads(path.read_text()) == found
    return found


def test_broken_stages_are_reported_and_the_rest_run(result: dict[str, Any]) -> None:
    found = result["stages"]
    assert {name: stage["status"] for name, stage in found.items()} == {
        "first": "passed", "broken": "failed", "half": "failed", "crash": "failed", "hang": "failed", "last": "passed"
    }  # fmt: skip
    assert found["broken"]["error"].splitlines()[-1] == "ZeroDivisionError: this stage is broken"
    assert found["half"]["error"] == "b is wrong"
    assert found["crash"]["error"].splitlines() == ["the process ended with code -9", "last words"]
    assert found["hang"]["error"].startswith("no end in ") and found["hang"]["rows"][0]["key"] == "before"
    assert found["first"]["rows"][0]["process"] != found["last"]["rows"][0]["process"]
    assert result["machine"]["cores"] and result["versions"]["torch"] == torch.__version__
    with pytest.raises(ProcessLookupError):  # nothing is left running
        os.kill(found["hang"]["rows"][0]["process"], 0)
    lines = table(result).splitlines()
    assert [line for line in lines if "ZeroDivisionError: this stage is broken" in line]
    assert [line.split()[:2] for line in lines if line.startswith("last")] == [["last", "passed"]]


def test_what_is_there_is_not_run_again(result: dict[str, Any]) -> None:
    """Neither a stage that passed, nor the good rows of one that did not."""
    before = json.loads(json.dumps(result))
    second = ran({"first": toy("fine"), "half": toy("halfway")}, before=before)["stages"]
    assert second["first"] == result["stages"]["first"]
    assert second["half"]["status"] == "passed" and second["half"]["error"] is None
    assert second["half"]["seconds"] >= result["stages"]["half"]["seconds"]  # of both
    a, b = second["half"]["rows"]
    assert a == result["stages"]["half"]["rows"][0] and b["passed"] and b["process"] != a["process"]


def test_a_stage_for_which_there_is_no_time_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.subprocess, "Popen", None)  # no process at all
    found = ran({"long": toy("fine", least=100), "longer": toy("fine", least=200)}, minutes=1)["stages"]
    assert {stage["status"] for stage in found.values()} == {"skipped"}
    assert found["longer"]["error"].endswith(" s left, it takes 200 at least")


def test_what_was_found_stands_where_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure stays one, with its error and seconds; and seconds add up."""
    monkeypatch.setattr(gpu.subprocess, "Popen", None)
    failed = {"status": "failed", "seconds": 70.0, "error": "b is wrong", "rows": []}
    found = ran({"half": toy("halfway", least=100)}, minutes=1, before={"stages": {"half": dict(failed)}})
    assert found["stages"]["half"] == failed
    measurement = Measurement({"half": toy("halfway")}, 1, tiny=True, before={"stages": {"half": dict(failed)}})
    measurement._end("half", "passed", 5.0)
    assert measurement.result["stages"]["half"]["seconds"] == measurement.result["command_seconds"] == 75.0


def test_a_stage_without_time_or_device_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads so, what comes after it in its process runs, and the exit code is 0."""
    monkeypatch.setattr(gpu, "STAGES", {"slow": toy("slow"), "small": toy("small"), "fine": toy("fine")})
    path = tmp_path / "found.json"
    assert main(["gpu", "--tiny", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["stages"]
    assert [stage["status"] for stage in found.values()] == ["unfinished", "skipped", "passed"]
    assert (found["slow"]["error"], found["small"]["error"]) == ("no time for b", "the card has 24.00GiB")
    assert found["slow"]["rows"][0]["process"] == found["fine"]["rows"][0]["process"]
    assert "slow        unfinished" in table({"stages": found})


def resumable(path: Path, **more: Any) -> Path:
    """A file that may be gone on with."""
    head = {"tiny": True, "command": "python -m bench gpu --stages whole", "sources": sources.digests("gpu")}
    path.write_text(json.dumps({**head, "stages": {}, **more}))
    return path


@pytest.mark.parametrize(("status", "code"), [(None, 0), ("failed", 1)])
def test_other_stages_of_a_file_count(
    status: str | None, code: int, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """One that was killed has no status; one that failed still has."""
    monkeypatch.setattr(gpu, "STAGES", {"whole": toy("fine"), "fine": toy("fine")})
    stage = {"rows": [], **({"status": status} if status else {})}
    path = resumable(tmp_path / "found.json", stages={"whole": stage})
    assert main(["gpu", "--tiny", "--stages", "fine", "--resume", str(path)]) == code
    found = json.loads(path.read_text())
    assert found["stages"]["fine"]["status"] == "passed" and found["stages"]["whole"] == stage
    assert found["command"] == "python -m bench gpu --minutes 9 --tiny"  # both are all that there are
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:2]] == [
        ["whole", status or "unfinished"]
    ]


def test_another_machine_is_refused(result: dict[str, Any]) -> None:
    """Before anything is measured, and what is there stays."""
    versions = {**result["versions"], "torch": "1.0"}
    before = json.loads(json.dumps(result)) | {"gpu": {"name": "NVIDIA H100", "bytes": 1}, "versions": versions}
    with pytest.raises(MachineError) as refusal:
        ran({"half": toy("halfway")}, before=before)
    told = f"is of NVIDIA H100 with torch 1.0, this is no GPU with torch {torch.__version__}; leave --resume out"
    assert told in str(refusal.value)
    assert before["versions"]["torch"] == "1.0" and before["stages"]["half"] == result["stages"]["half"]
    assert gpu_file.other_machine(before, {"gpu": {"name": "NVIDIA H100", "bytes": 2}, "versions": versions}) is None
    assert gpu_file.other_machine(before, {"gpu": {"name": "NVIDIA H200"}, "versions": versions}) is not None
    assert gpu_file.other_machine({"stages": {}}, result) is None


def test_changed_code_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = sources.digests("gpu")
    older = {**now, **dict.fromkeys(sorted(now)[:5], "old")}
    path = resumable(tmp_path / "found.json", sources=older)
    assert main(["gpu", "--tiny", "--resume", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"before {', '.join(sorted(now)[:3])} and 2 more changed; leave --resume out" in line


def test_a_file_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = resumable(tmp_path / "found.json")
    assert main(["gpu", "--tiny", "--json", str(path)]) == 2
    assert "exists: --resume " in capsys.readouterr().err


def test_an_interrupted_run_can_be_gone_on_with(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are in the file, and how to go on is printed; there is no traceback, and no process is left."""
    monkeypatch.setattr(gpu, "STAGES", {"hang": toy("hangs"), "fine": toy("fine")})
    path = tmp_path / "found.json"

    def interrupted(seconds: float) -> None:
        if path.exists() and '"before"' in path.read_text():
            raise KeyboardInterrupt
        os.sched_yield()

    monkeypatch.setattr(gpu.time, "sleep", interrupted)
    assert main(["gpu", "--tiny", "--stages", "hang", "--json", str(path)]) == 3
    captured = capsys.readouterr()
    assert "hang        unfinished" in captured.out and "Traceback" not in captured.err
    last = captured.err.splitlines()[-1]
    assert last == f"  python -m bench gpu --resume {path} --stages hang --minutes 9 --tiny"
    (row,) = json.loads(path.read_text())["stages"]["hang"]["rows"]
    with pytest.raises(ProcessLookupError):
        os.kill(row["process"], 0)


def test_a_run_that_is_interrupted_at_once_has_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.subprocess, "Popen", interrupted)
    path = tmp_path / "found.json"
    assert main(["gpu", "--tiny", "--json", str(path)]) == 3
    assert gpu_file.read(path, tiny=True)["stages"] == {}


def test_lines_are_read_when_they_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with path.open("w") as writing, path.open() as reading:
        events = Events(reading)
        found = []
        for part in ('{"event": "beg', 'in"}\n{"event"', "", ': "row"}\n{"ev', 'ent": "end"}\n', '{"event": "killed'):
            writing.write(part)
            writing.flush()
            found.append([event["event"] for event in events.new()])
    assert found == [[], ["begin"], [], ["row"], ["end"], []]


def test_no_stage_outlasts_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take 60 seconds, and the command 3 of them."""
    monkeypatch.setattr(gpu, "_GRACE", 0.0)
    found = ran({"hang": toy("hangs")}, minutes=3 / 60)["stages"]
    assert found["hang"]["status"] == "failed" and found["hang"]["seconds"] < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "ceilings,rest"], "stages=rest is unknown: choose from correctness, "),
        (["--minutes", "0"], "minutes=0 must be above 0"),
        (["--resume", "nowhere.json"], "resume=nowhere.json is no file that bench gpu wrote"),
        (["--json", "nowhere/found.json"], "no folder; make it first"),
        (["--fast"], "unknown argument --fast"),
    ],
)
def test_wrong_settings(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--tiny", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench gpu: error: ") and message in line


def test_a_dry_run_is_resumed_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"tiny": True, "stages": {}}))
    assert main(["gpu", "--resume", str(path)]) == 2
    assert "was made with --tiny: do the same" in capsys.readouterr().err


def test_a_dry_run_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The quickest stage; `python -m bench gpu --tiny` runs all of them in this way."""
    path = tmp_path / "tiny.json"
    assert main(["gpu", "--tiny", "--stages", "ceilings", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["tiny"] and found["gpu"] is None and found["versions"]["torch"] == torch.__version__
    assert found["command"] == "python -m bench gpu --stages ceilings --minutes 9 --tiny"
    assert [row["key"] for row in found["stages"]["ceilings"]["rows"]] == ["matrix product", "copies", "host"]
    out = capsys.readouterr().out
    assert "no GPU: toy sizes on the CPU" in out and "ceilings    passed" in out


def test_steps_under_a_cap_pass_on_the_cpu() -> None:
    rows: list[dict[str, Any]] = []
    gpu_stages.step_24(Context(tiny=True, deadline=time.monotonic() + 3600, emit=rows.append))
    assert [row["key"] for row in rows] == ["512", "1024"]
    for row in rows:
        assert row["faults"] == [] and row["planned_peak_bytes"] <= 3850 * 1024
        assert all(share > 0 for share in row["weights_changed"]) and len(row["losses"]) == row["timed"] == 1
        assert row["copies"]["h2d_bytes"] > 0  # weights do not stay in so little memory
    wrong = {**rows[0], "losses": [float("nan")], "weights_changed": [0.0, 0.5]}
    assert gpu_stages._faults(wrong) == ["the loss is not finite", "weights have not changed"]
    assert gpu_stages._faults({"failed": "ValueError: of us"}) == ["ValueError: of us"]


def test_ballast_that_leaves_too_much_is_caught() -> None:
    """24 GiB and 64 MiB are the most."""
    cap = 24 * 2**30
    assert gpu_stages._ballast_faults({"taken": 1, "left": cap + 64 * 2**20}, cap) == []
    assert gpu_stages._ballast_faults({"taken": 1, "left": 25 * 2**30}, cap) == [
        "the ballast left 25.00 GiB, the cap is 24.00"
    ]
    assert gpu_stages._ballast_faults({"none": "why"}, cap) == gpu_stages._ballast_faults({}, cap) == []
    row = {"key": "512", "way": "512 pixels", "refused": "too large"}
    for ballast, told in (({"taken": 1, "left": cap}, "with ballast"), ({"none": "why"}, "without ballast (why)")):
        text = table({"stages": {"step-24": {"status": "passed", "rows": [row | {"ballast": ballast}]}}})
        assert text.splitlines()[1].endswith(f"too large; {told}")


def test_a_cap_above_the_card_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_variants, "card_bytes", lambda device: 24 * 2**30)
    monkeypatch.setattr(gpu_stages, "_step", None)
    with pytest.raises(gpu_stages.SkippedError, match=r"cap 48GiB: the card has 24\.00GiB"):
        gpu_stages.step_48(Context(tiny=True, deadline=time.monotonic() + 3600))


def test_host_memory_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less 3 % where that is less than what is wanted."""
    monkeypatch.setattr(step_variants, "host_available", lambda: 100 * 2**30)
    assert step_variants.host_bytes("112GiB") == step_variants.host_bytes(None) == 97 * 2**30
    assert step_variants.host_bytes("96GiB") == 96 * 2**30
    monkeypatch.setattr(step_variants, "host_available", lambda: None)
    assert step_variants.host_bytes("112GiB") == 112 * 2**30 and step_variants.host_bytes(None) is None


def test_a_way_that_fails_is_a_fault_of_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are still measured, and it is measured again."""
    tried: list[str] = []

    def row(self: throughput.Measurement, name: str) -> dict[str, Any]:
        tried.append(name)
        return {"way": name, **({"failed": "ValueError: of us"} if name == "resident" else {})}

    monkeypatch.setattr(throughput.Measurement, "row", row)
    rows: list[dict[str, Any]] = []
    with pytest.raises(gpu_stages.FailedError, match="resident: ValueError: of us"):
        gpu_stages.ways(Context(tiny=True, deadline=time.monotonic() + 3600, emit=rows.append))
    assert tried == ["streamed, 3850KiB", "resident", "plain"]
    measurement = Measurement({}, 1, tiny=True, before={"stages": {"throughput": {"rows": rows}}})
    assert measurement._done("throughput") == [tried[0], tried[2]]


def test_operations_without_time_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the four toy operations are left: one is there. And one that fails is a fault, with others after it."""
    rows: list[dict[str, Any]] = []
    with pytest.raises(gpu_stages.UnfinishedError, match="^no time for 3 operations$"):
        gpu_stages.kernel_times(Context(True, time.monotonic(), ["sum_of_squares bf16 None"], rows.append))
    assert rows == []

    def measured(case: Any, device: torch.device) -> dict[str, Any]:
        if case.name == "leap":
            raise RuntimeError("out of registers\nmore of it")
        return {"dtype": case.dtype, "ways": {}}

    monkeypatch.setattr(kernels, "_measured", measured)
    with pytest.raises(gpu_stages.FailedError, match="1 operations failed"):
        gpu_stages.kernel_times(Context(True, time.monotonic() + 3600, emit=rows.append))
    assert [row["key"] for row in rows if row.get("faults") == ["RuntimeError: out of registers"]] == ["leap bf16 64"]
    assert len(rows) == 4 and ["operation" in row for row in rows].count(False) == 1


def test_memory_against_length_is_a_stage() -> None:
    """What it emits stands in the report beside the curves of `bench memory`, and without time it is not finished."""
    rows: list[dict[str, Any]] = []
    gpu_stages.trajectory(Context(tiny=True, deadline=time.monotonic() + 3600, emit=rows.append))
    (row,) = rows
    assert row["faults"] == [] and row["lengths"] == [1, 2] and set(row["peak_bytes"]) == set(METHODS)
    stages = {"trajectory": {"status": "passed", "seconds": 1.0, "rows": rows}}
    (line,) = [line for line in table({"stages": stages}).splitlines() if line.startswith("trajectory")]
    assert "shapes: differentiated steps in one graph 0.0" in line and "GiB with 2; the engine 0.0" in line
    result = {"command": "python -m bench gpu", "machine": {"gpu": "A GPU"}, "gpu": {"name": "A GPU"}, "stages": stages}
    (part,) = parts(result)
    text = trajectory_table([part])
    assert "| shapes | 1 step | 2 steps | a step more |" in text and "Measured on real tensors on A GPU" in text
    late: list[dict[str, Any]] = []
    with pytest.raises(gpu_stages.UnfinishedError, match="no time for 31 points"):  # LeapAlign has one of six lengths
        gpu_stages.trajectory(Context(tiny=False, deadline=time.monotonic(), emit=late.append))
    assert late[0]["faults"] == ["no time for 31 points"]
    gpu_stages.trajectory(Context(tiny=True, deadline=0, done=["shapes"], emit=late.append))
    assert len(late) == 1


# ---- what the checks of a device catch -----------------------------------------------------------------------------


def test_a_kernel_that_is_off_is_caught() -> None:
    case = next(kernel_cases.cases(kernel_cases.Shapes(64, **kernels._TINY), CPU))
    ours = case.ways["leapalign"]
    assert not isinstance(ours, str)
    assert gpu_correctness._kernel(case, CPU)["passed"]
    wrong = replace(case, ways={"leapalign": lambda tensors: lambda: tuple(1.05 * y for y in ours(tensors)())})
    assert not gpu_correctness._kernel(wrong, CPU)["passed"]


def test_one_bit_of_an_update_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(**given: Any) -> None:
        gpu_correctness.adamw8bit.update(**given)
        given["codes_v"][-1] ^= 1

    assert gpu_correctness._update("bf16", "residual", CPU)["passed"]
    monkeypatch.setattr(gpu_correctness, "update_triton", off)
    row = gpu_correctness._update("bf16", "residual", CPU)
    assert not row["passed"] and any("by device, not definition" in each for each in row["different"])


def test_a_check_that_cannot_run_has_failed() -> None:
    def check() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    assert gpu_correctness.checked("kernel", check) == {
        "key": "kernel",
        "passed": False,
        "error": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
