"""Everything that needs a GPU, in one command and within minutes: bench/gpu_stages.py says what.

    correctness    kernels, updates and whole steps against references, and the suite's own tests
    ceilings       a matrix product, copies to and from the device, the host's update
    step-24        optimizer steps of FLUX.1-dev's size at 512 and 1024 pixels, with 24 GiB of the device
    step-48        the same with 48 GiB
    kernels        bench kernels, as far as the time lasts
    throughput     bench throughput at a quarter of FLUX.1-dev's size, where every way fits
    whole          its ways without the engine at the whole size
    trajectory     bench memory --trajectory of SD3.5-M's size: memory against differentiated steps

Stages run in processes of their own, so that a crash or a hang takes nothing along; those that need nothing of their
own share one. A stage is begun only if there is time for it. What is found is written as it comes, and --resume goes
on: rows that are there are not measured again. With --tiny all of it is tried out on the CPU with toy sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu_words import table
from bench.sources import digests

SUMMARY = "every measurement that needs a GPU, in stages and within minutes; --tiny tries it out on the CPU"
RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parent.parent
_START = 120.0  # seconds for a process to begin its first stage
_GRACE = 10.0  # and for a stage to end by itself
SEED = 0  # of the stages' draws: bench.step_ways.SEED, which is not imported here as that takes seconds
_LAST = 6  # lines of a broken process's output that are kept


@dataclass(frozen=True)
class Stage:
    """What may be run.

    Attributes:
        function: "module:name", of a Context.
        least: seconds without which it is not begun.
        seconds: that it may take.
        fresh: it has to be the first in its process.
    """

    function: str
    least: float
    seconds: float
    fresh: bool = False


STAGES = {
    "correctness": Stage("bench.gpu_stages:correctness", 30, 150),
    "ceilings": Stage("bench.gpu_stages:ceilings", 15, 40),
    "step-24": Stage("bench.gpu_stages:step_24", 90, 210, fresh=True),
    "step-48": Stage("bench.gpu_stages:step_48", 90, 190, fresh=True),
    "kernels": Stage("bench.gpu_stages:kernel_times", 45, 240, fresh=True),
    "throughput": Stage("bench.gpu_stages:ways", 60, 150, fresh=True),
    "whole": Stage("bench.gpu_stages:whole_ways", 60, 180, fresh=True),
    "trajectory": Stage("bench.gpu_stages:trajectory", 60, 300, fresh=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench gpu`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stages", help=f"some of {','.join(STAGES)} (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all may take (default: %(default)g)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: what is measured means nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(default: bench/results/<gpu>-<date>.json)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with what this file has, and write it")


def run(options: argparse.Namespace, unknown: list[str]) -> int:
    """Run the stages, write the result file, print a table. Exit code 1 if a stage failed, 2 for wrong settings."""
    try:
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]}; see --help")
        chosen = _chosen(options.stages)
        if not options.minutes > 0:
            raise ValueError(f"minutes={options.minutes:g} must be above 0")
        before = _read(options.resume, options.tiny) if options.resume else {"stages": {}}
        path = options.json or options.resume
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"json={path}: {path.absolute().parent} is no folder; make it first")
    except ValueError as error:
        print(f"bench gpu: error: {error}", file=sys.stderr)
        return 2
    measurement = Measurement({name: STAGES[name] for name in chosen}, options.minutes, options.tiny, before, path)
    head = {"date": datetime.now(UTC).date().isoformat(), "command": _command(options), "seed": [SEED],
            "sources": digests("gpu")}  # fmt: skip
    measurement.result = {**head, **measurement.result}  # those of the oldest rows, where it is gone on
    try:
        with _terminated():
            measurement.run()
    except NoGPUError as error:
        print(f"bench gpu: error: {error}", file=sys.stderr)
        return 2
    print(table(measurement.result))
    if measurement.path:
        print(f"wrote {measurement.path.name}", file=sys.stderr)
    return 1 if any(stage["status"] == "failed" for stage in measurement.result["stages"].values()) else 0


class NoGPUError(Exception):
    """There is none."""


class Measurement:
    """Runs stages in processes, and keeps what they tell.

    Attributes:
        result: {"tiny", "machine", "versions", "gpu", "stages": {name: {"status", "seconds", "rows", "error"}}}; status
            is "passed", "failed" or "skipped".
        path: of the result file; None: it is named when the GPU's name is known, and with `tiny` there is none.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        minutes: float,
        tiny: bool,
        before: Mapping[str, Any] | None = None,
        path: Path | None = None,
    ) -> None:
        self._stages, self._tiny, self.path = stages, tiny, path
        self._deadline = time.monotonic() + 60 * minutes
        self.result: dict[str, Any] = {"tiny": tiny, **(before or {})}
        found = self.result.setdefault("stages", {})
        status = {name: found.get(name, {}).get("status") for name in stages}
        # what has failed before may fail again: it comes last
        self._waiting = sorted((n for n in stages if status[n] != "passed"), key=lambda n: status[n] == "failed")

    def run(self) -> None:
        """All stages that have not passed already, as far as the minutes last.

        Raises:
            NoGPUError: there is none, and these are not toy sizes.
        """
        while self._waiting:
            name = self._waiting[0]
            left, least = self._deadline - time.monotonic() - _GRACE, self._stages[name].least
            if left < least:
                self._end(name, "skipped", error=f"{max(left, 0):.0f} s left, it takes {least:.0f} at least")
            else:
                self._process(self._together())

    def _together(self) -> list[str]:
        """The stages of the next process. On the CPU nothing is ever in another one's way."""
        chosen = self._waiting[:1]
        for name in self._waiting[1:]:
            if not self._tiny and (self._stages[name].fresh or self._stages[chosen[0]].fresh):
                break
            chosen.append(name)
        return chosen

    def _process(self, names: Sequence[str]) -> None:
        """Run stages in one process; those that it does not come to are left waiting."""
        with tempfile.TemporaryDirectory() as folder:
            lines, output = Path(folder) / "lines", Path(folder) / "output"
            lines.touch()
            given = {
                "tiny": self._tiny,
                "deadline": self._deadline - _GRACE / 2,
                "lines": str(lines),
                "stages": [{"name": name, **asdict(self._stages[name]), "done": self._done(name)} for name in names],
            }
            began, current, begun = time.monotonic(), names[0], False
            with output.open("wb") as written, output.open("rb") as seen, lines.open() as told:
                process = subprocess.Popen(
                    [sys.executable, "-m", "bench.gpu_process", json.dumps(given)],
                    stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, cwd=_ROOT, process_group=0,
                )  # fmt: skip
                try:
                    while True:
                        ended = process.poll() is not None  # before reading: what was told by then is read
                        self._pass_on(seen)
                        for line in told:
                            event = json.loads(line)
                            if event["event"] == "begin":
                                began, current, begun = time.monotonic(), event["stage"], True
                            self._take(event, began)
                        limit = self._stages[current].seconds + _GRACE if begun else _START
                        if ended or time.monotonic() > min(began + limit, self._deadline):
                            break
                        time.sleep(0.05)
                finally:
                    _kill(process)
            if current in self._waiting and (begun or process.returncode):  # it never came to its end
                last = output.read_text(errors="replace").strip().splitlines()[-_LAST:]
                seconds = time.monotonic() - began
                why = f"the process ended with code {process.returncode}" if ended else f"no end in {seconds:.0f} s"
                self._end(current, "failed", seconds, "\n".join([why, *last]))

    def _take(self, event: Mapping[str, Any], began: float) -> None:
        """Keep what a process told."""
        if event["event"] == "no gpu":
            raise NoGPUError(f"torch {event['torch']} sees no CUDA GPU; --tiny tries everything out on the CPU")
        if event["event"] == "machine":
            self.result |= {key: event[key] for key in ("machine", "versions", "gpu")}
        elif event["event"] == "begin":
            self._found(event["stage"])
        elif event["event"] == "row":
            rows, row = self._found(event["stage"])["rows"], event["row"]
            rows[:] = [*(each for each in rows if each["key"] != row["key"]), row]
        elif event["event"] == "end":
            self._end(event["stage"], event["status"], time.monotonic() - began, event.get("error"))
        self._save()

    def _found(self, name: str) -> dict[str, Any]:
        """What there is of a stage, that of an earlier run included."""
        found: dict[str, Any] = self.result["stages"].setdefault(name, {"rows": []})
        return found

    def _done(self, name: str) -> list[str]:
        """Keys of the rows that need not be measured again: nothing was wrong with them."""
        rows = self._found(name)["rows"]
        return [row["key"] for row in rows if row.get("passed", True) and not row.get("faults")]

    def _end(self, name: str, status: str, seconds: float = 0.0, error: str | None = None) -> None:
        found = self._found(name)
        found |= {"status": status, "seconds": round(seconds, 1), "error": error}
        took = [stage.get("seconds", 0.0) for stage in self.result["stages"].values()]
        self.result["command_seconds"] = round(sum(took), 1)
        self._waiting.remove(name)
        print(f"bench gpu: {name} {status}{f': {error}' if error else ''}", file=sys.stderr, flush=True)
        self._save()

    def _save(self) -> None:
        if self.path is None and self.result.get("gpu") and not self._tiny:
            self.path = _new_file(self.result["gpu"]["name"])
        if self.path is not None:
            unfinished = self.path.with_suffix(".part")
            unfinished.write_text(json.dumps(self.result, indent=1) + "\n")
            unfinished.replace(self.path)

    @staticmethod
    def _pass_on(output: Any) -> None:
        text = output.read().decode(errors="replace")
        if text:
            sys.stderr.write(text)
            sys.stderr.flush()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started; nothing if there is nothing left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, so that no process is left behind."""

    def stop(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _chosen(text: str | None) -> list[str]:
    names = list(STAGES) if text is None else text.split(",")
    for name in names:
        if name not in STAGES:
            raise ValueError(f"stages={name} is unknown: choose from {', '.join(STAGES)}")
    return [name for name in STAGES if name in names]  # in order of value


def _read(path: Path, tiny: bool) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        found["stages"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"resume={path} is no file that bench gpu wrote") from None
    if found.get("tiny") != tiny:
        raise ValueError(f"resume={path} was {'' if found.get('tiny') else 'not '}made with --tiny: do the same")
    return found


def _new_file(gpu: str) -> Path:
    """bench/results/<gpu>-<date>.json, with a number if there is one already."""
    name = f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{datetime.now(UTC).date().isoformat()}"
    paths = (RESULTS / f"{name}{f'-{number}' if number > 1 else ''}.json" for number in range(1, 1000))
    return next(path for path in paths if not path.exists())


def _command(options: argparse.Namespace) -> str:
    stages = ["--stages", options.stages] if options.stages else []
    minutes = ["--minutes", f"{options.minutes:g}"]
    return shlex.join(["python", "-m", "bench", "gpu", *stages, *minutes, *(["--tiny"] if options.tiny else [])])
