"""Runs that are killed at random moments and gone on with, each in a process of its own.

`python -m tests.run.killed_runs FOLDER` loads the libraries once and forks, because loading takes longer than a run;
the first process computes nothing, since torch's threads do not survive a fork.
A moment is a number of Python and C function calls since the first step, so that it is the same in every repetition.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from leapalign.run.streamed_state import StreamedState
from leapalign.run.trainer import Trainer
from tests.families.tiny_pipeline import ColourReward, save_tiny_pipeline, tiny_config

SETTINGS: dict[str, Any] = {
    "executor": "streamed", "optimizer": "adamw8bit", "weight_dtype": "bf16", "master": "residual", "clip": "block",
    "max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "train_batch_size": 2,
}  # fmt: skip
MOMENTS = 10  # of training, and as many while it saves


def trained(root: Path, out: Path, **changes: Any) -> Trainer:
    run = Trainer(tiny_config(root / "pipeline", out, **SETTINGS, **changes), reward=ColourReward())
    run.run()
    return run


def digest(run: Trainer) -> str:
    """Of weights, average, states, the exported transformer and the metrics without their times."""
    state = run.state
    assert isinstance(state, StreamedState)
    found = hashlib.sha256(f"{state.step} {state.skipped} {state.optimizer.steps}".encode())
    for name, parameter in state.parameters.items():
        for value in (parameter.detach(), *state.optimizer.state[parameter].values()):
            if isinstance(value, torch.Tensor):
                found.update(name.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
    found.update((run.output_dir / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    for line in (run.output_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.update(json.dumps({key: row[key] for key in row if key not in ("seconds", "memory")}).encode())
    return found.hexdigest()


class Calls:
    """Counts function calls in this thread; kills the process at one of them."""

    def __init__(self, deadly: int | None = None) -> None:
        self.count, self._deadly = 0, deadly
        self.saves: list[tuple[int, int]] = []  # the calls between which a checkpoint or the result is written
        for name in ("save", "export"):
            setattr(StreamedState, name, self._noting(getattr(StreamedState, name)))
        self._step = Trainer._train_step
        setattr(Trainer, "_train_step", lambda run: self._counted(run))  # noqa: B010 - mypy minds an assignment

    def _counted(self, run: Trainer) -> dict[str, Any]:
        sys.setprofile(self._called)
        return self._step(run)

    def _called(self, *_: object) -> None:
        self.count += 1
        if self.count == self._deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def _noting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            first = self.count
            result = method(*arguments)
            self.saves.append((first, self.count))
            return result

        return noted


def forked(job: Callable[[], Any]) -> tuple[int, Any]:
    """(signal that ended it, what it returned) of a job in a process of its own."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os.write(writable, json.dumps(job()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writable)
    with open(readable) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, json.loads(text) if text else None


def prepare(root: Path) -> None:
    save_tiny_pipeline(root / "pipeline")
    trained(root, root / "first")  # fills the cache of prompt embeddings


def count_calls(root: Path) -> tuple[int, list[tuple[int, int]], str]:
    calls = Calls()
    run = trained(root, root / "whole")
    sys.setprofile(None)
    return calls.count, calls.saves, digest(run)


def kill(root: Path, out: Path, moment: int) -> None:
    Calls(moment)
    trained(root, out)


def resume(root: Path, out: Path) -> str:
    return digest(trained(root, out, resume_from_checkpoint="latest"))


def main(root: Path) -> None:
    forked(partial(prepare, root))
    count, saves, expected = forked(partial(count_calls, root))[1]
    draw = random.Random(4)
    moments = [draw.randrange(1, count) for _ in range(MOMENTS)]
    moments += [draw.randint(*draw.choice(saves)) for _ in range(MOMENTS)]
    for moment in moments:
        out = root / f"run-{moment}"
        ended = forked(partial(kill, root, out, moment))[0]
        left = sorted(path.name for path in out.iterdir())
        same = forked(partial(resume, root, out))[1] == expected
        hidden = [path.name for path in out.iterdir() if path.name.startswith(".")]
        print(
            json.dumps({"moment": moment, "of": count, "signal": ended, "left": left, "same": same, "hidden": hidden})
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
