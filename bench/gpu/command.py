"""Everything that needs a GPU, in one command and within minutes: bench/gpu/stages.py says what.

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
on where GPU, torch and code are the same: rows that are there are not measured again. With --tiny all of it is tried
out on the CPU with toy sizes.
"""

from __future__ import annotations

import argparse
import json
import os
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
from typing import IO, Any

from bench.gpu import file as gpu_file
from bench.gpu.text import table
from bench.sources import digests

_ROOT = Path(__file__).parents[2]
_START = 120.0  # seconds for a process to begin its first stage
_GRACE = 10.0  # and for a stage to end by itself
SEED = 0  # of the stages' draws: bench.speed.step_variants.SEED, which is not imported here as that takes seconds
_LAST = 6  # lines of a broken process's output that are kept
_INTERRUPTED = 3  # exit code, as leapalign's own


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
    "correctness": Stage("bench.gpu.stages:correctness", 30, 150),
    "ceilings": Stage("bench.gpu.stages:ceilings", 15, 40),
    "step-24": Stage("bench.gpu.stages:step_24", 90, 210, fresh=True),
    "step-48": Stage("bench.gpu.stages:step_48", 90, 190, fresh=True),
    "kernels": Stage("bench.gpu.stages:kernel_times", 45, 240, fresh=True),
    "throughput": Stage("bench.gpu.stages:ways", 60, 150, fresh=True),
    "whole": Stage("bench.gpu.stages:whole_ways", 60, 180, fresh=True),
    "trajectory": Stage("bench.gpu.stages:trajectory", 60, 300, fresh=True),
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
    """Run the stages, write the result file, print a table.

    Exit code 1 if a stage has failed, 2 for wrong settings, 3 if it was interrupted: then how to go on is printed.
    """
    try:
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]}; see --help")
        chosen = _chosen(options.stages)
        if not options.minutes > 0:
            raise ValueError(f"minutes={options.minutes:g} must be above 0")
        before = gpu_file.read(options.resume, options.tiny) if options.resume else {"stages": {}}
        path = options.json or options.resume
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"json={path}: {path.absolute().parent} is no folder; make it first")
        if options.json and not options.resume and path.exists():
            raise ValueError(f"json={path} exists: --resume {path} goes on with it, or give another name")
    except ValueError as error:
        print(f"bench gpu: error: {error}", file=sys.stderr)
        return 2
    measurement = Measurement({name: STAGES[name] for name in chosen}, options.minutes, options.tiny, before, path)
    given = {"minutes": options.minutes, "tiny": options.tiny}
    everything = gpu_file.stages_of(before, list(STAGES)) | set(chosen)
    head = {"date": datetime.now(UTC).date().isoformat(), "seed": [SEED], "sources": digests("gpu")}
    # the date of the oldest rows, where it is gone on
    measurement.result = {**head, **measurement.result, "command": gpu_file.command(everything, list(STAGES), **given)}
    interrupted = False
    try:
        with _terminated():
            measurement.run()
    except MachineError as error:
        print(f"bench gpu: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interrupted = True
    print(table(measurement.result))
    if measurement.path:
        print(f"wrote {measurement.path.name}", file=sys.stderr)
    if interrupted:
        again = gpu_file.command(chosen, list(STAGES), **given, resume=measurement.path)
        print(f"bench gpu: interrupted; {'go on with' if measurement.path else 'start again with'}:\n  {again}",
              file=sys.stderr)  # fmt: skip
        return _INTERRUPTED
    return 1 if any(stage.get("status") == "failed" for stage in measurement.result["stages"].values()) else 0


class MachineError(Exception):
    """It cannot be measured here: there is no GPU, or another one than that of the file which is gone on with."""


class Measurement:
    """Runs stages in processes, and keeps what they tell.

    Attributes:
        result: {"tiny", "machine", "versions", "gpu", "stages": {name: {"status", "seconds", "rows", "error"}}}; status
            is "passed", "failed", "unfinished" (nothing was wrong as far as it came) or "skipped"; seconds are those of
            all runs that went on with one another.
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
            MachineError: there is no GPU, and these are not toy sizes; or rows that are there are of another one.
            KeyboardInterrupt: what has come so far is in the file.
        """
        try:
            self._run()
        except KeyboardInterrupt:
            self._save()
            raise

    def _run(self) -> None:
        unknown = bool(self.result.get("versions"))
        while self._waiting:
            name = self._waiting[0]
            left, least = self._deadline - time.monotonic() - _GRACE, self._stages[name].least
            if left < least:
                self._skip(name, f"{max(left, 0):.0f} s left, it takes {least:.0f} at least")
            elif unknown:  # before anything is measured, in a process of its own: asking makes a context
                unknown = False
                self._process([])
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
        """Run stages in one process; those that it does not come to are left waiting. Of none it tells the machine."""
        with tempfile.TemporaryDirectory() as folder:
            lines, output = Path(folder) / "lines", Path(folder) / "output"
            lines.touch()
            given = {
                "tiny": self._tiny,
                "deadline": self._deadline - _GRACE / 2,
                "lines": str(lines),
                "stages": [{"name": name, **asdict(self._stages[name]), "done": self._done(name)} for name in names],
            }
            began, current, begun = time.monotonic(), "", False
            with output.open("wb") as written, output.open("rb") as seen, lines.open() as told:
                events = Events(told)
                process = subprocess.Popen(
                    [sys.executable, "-m", "bench.gpu.process", json.dumps(given)],
                    stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, cwd=_ROOT, process_group=0,
                )  # fmt: skip
                try:
                    while True:
                        ended = process.poll() is not None  # before reading: what was told by then is read
                        self._pass_on(seen)
                        for event in events.new():
                            if event["event"] == "begin":
                                began, current, begun = time.monotonic(), event["stage"], True
                            self._take(event, began)
                        limit = self._stages[current].seconds + _GRACE if begun else _START
                        if ended or time.monotonic() > min(began + limit, self._deadline):
                            break
                        time.sleep(0.05)
                except KeyboardInterrupt:
                    if begun and current in self._waiting:
                        self._interrupt(current, time.monotonic() - began)
                    raise
                finally:
                    _kill(process)
            current = current or next(iter(names), "")
            if current in self._waiting and (begun or process.returncode):  # it never came to its end
                last = output.read_text(errors="replace").strip().splitlines()[-_LAST:]
                seconds = time.monotonic() - began
                why = f"the process ended with code {process.returncode}" if ended else f"no end in {seconds:.0f} s"
                self._end(current, "failed", seconds, "\n".join([why, *last]))

    def _take(self, event: Mapping[str, Any], began: float) -> None:
        """Keep what a process told."""
        if event["event"] == "no gpu":
            raise MachineError(f"torch {event['torch']} sees no CUDA GPU; --tiny tries everything out on the CPU")
        if event["event"] == "machine":
            if (other := gpu_file.other_machine(self.result, event)) is not None:
                raise MachineError(other)
            self.result |= {key: event[key] for key in ("machine", "versions", "gpu")}
        elif event["event"] == "begin":
            found = self._found(event["stage"])
            if found.get("status") in (None, "skipped"):  # until it ends: this run may be killed
                found |= {"status": "unfinished", "error": None}
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
        rows = self.result["stages"].get(name, {}).get("rows", [])
        return [row["key"] for row in rows if row.get("passed", True) and not row.get("faults")]

    def _end(self, name: str, status: str, seconds: float, error: str | None = None) -> None:
        self._found(name).update(status=status, error=error)
        self._took(name, seconds)
        self._waiting.remove(name)
        print(f"bench gpu: {name} {status}{f': {error}' if error else ''}", file=sys.stderr, flush=True)
        self._save()

    def _skip(self, name: str, why: str) -> None:
        """There is no time for it. What an earlier run found stands."""
        if self._found(name).get("status") in (None, "skipped"):
            self._end(name, "skipped", 0.0, why)
            return
        self._waiting.remove(name)
        print(f"bench gpu: {name} is left as it was: {why}", file=sys.stderr, flush=True)

    def _interrupt(self, name: str, seconds: float) -> None:
        """Its rows stay, and a failure of an earlier run."""
        if self._found(name).get("status") == "unfinished":
            self._found(name)["error"] = "interrupted"
        self._took(name, seconds)

    def _took(self, name: str, seconds: float) -> None:
        found = self._found(name)
        found["seconds"] = round(found.get("seconds", 0.0) + seconds, 1)
        took = [stage.get("seconds", 0.0) for stage in self.result["stages"].values()]
        self.result["command_seconds"] = round(sum(took), 1)

    def _save(self) -> None:
        if self.path is None and self.result.get("gpu") and not self._tiny:
            self.path = gpu_file.new(self.result["gpu"]["name"])
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


class Events:
    """What a process tells in a file, a line of JSON each, while it still writes."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._begun = file, ""

    def new(self) -> Iterator[dict[str, Any]]:
        """Those whose lines have come to their ends since; the beginning of another one is kept for the next time."""
        *lines, self._begun = (self._begun + self._file.read()).split("\n")
        yield from map(json.loads, lines)


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
