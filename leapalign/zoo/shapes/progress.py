"""State files and progress lines of the pretraining stages."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch


class Progress:
    """Prints a line every `every` steps: step, running means of the shown values, seconds left."""

    def __init__(self, name: str, start: int, steps: int, every: int = 100) -> None:
        self.name, self.start, self.steps, self.every = name, start, steps, every
        self.began = time.monotonic()
        self.sums: dict[str, float] = {}

    def show(self, step: int, **values: float) -> None:
        """Add this step's values; print when the step is a multiple of `every` or the last."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        if step % self.every == 0 or step == self.steps:
            count = (step - 1 - self.start) % self.every + 1
            pace = (time.monotonic() - self.began) / (step - self.start)
            means = "  ".join(f"{key} {total / count:.4f}" for key, total in self.sums.items())
            print(
                f"{self.name} {step}/{self.steps}  {means}  {pace:.3f} s/step  {pace * (self.steps - step):.0f} s left",
                flush=True,
            )
            self.sums.clear()


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
