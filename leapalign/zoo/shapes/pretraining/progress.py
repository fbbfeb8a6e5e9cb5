"""State files and progress lines of the pretraining stages."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch


class Progress:
    """Prints a line every `every` steps: step, running means of the shown values, seconds left.

    Saved and loaded with a stage's state, so that `seconds` counts the time of all its parts.
    """

    def __init__(self, name: str, steps: int, every: int = 100) -> None:
        self.name, self.steps, self.every = name, steps, every
        self._before, self._began, self._shown = 0.0, time.monotonic(), 0
        self._values: dict[str, list[float]] = {}

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that the stage has taken, those before it was stopped included."""
        return self._before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, float]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on counting from the seconds of an earlier part."""
        self._before = state["seconds"]

    def show(self, step: int, **values: float) -> None:
        """Add this step's values; print when the step is a multiple of `every` or the last."""
        self._shown += 1
        for key, value in values.items():
            self._values.setdefault(key, []).append(value)
        if step % self.every == 0 or step == self.steps:
            pace = (time.monotonic() - self._began) / self._shown
            means = "  ".join(f"{key} {sum(found) / len(found):.4f}" for key, found in self._values.items())
            left = pace * (self.steps - step)
            print(f"{self.name} {step}/{self.steps}  {means}  {pace:.3f} s/step  {left:.0f} s left", flush=True)
            self._values.clear()


def save_state(path: Path, step: int, **parts: Any) -> None:
    """Write the step and every part's state_dict, atomically."""
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
    os.replace(temporary, path)


def load_state(path: Path, **parts: Any) -> int:
    """Load every part's state from `path`; returns the step to go on from, 0 where there is no file."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])
