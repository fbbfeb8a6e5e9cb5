"""What tests of runs share: rows, states, and a reward that acts at a call."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leapalign.run.state import TrainState
from leapalign.run.trainer import Trainer
from tests.families.tiny_pipeline import ColourReward


def rows(run: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]


def everything(state: Any) -> dict[str, Tensor]:
    """Weights, average and optimizer states by name."""
    assert isinstance(state, TrainState)
    found = {f"w/{name}": p.detach() for name, p in state.parameters.items()}
    found |= {f"ema/{name}": t for name, t in (state.ema.tensors if state.ema else {}).items()}
    for name, parameter in state.parameters.items():
        found |= {f"{key}/{name}": t for key, t in state.optimizer.state[parameter].items()}
    return found


class AtCall(ColourReward):
    """The same reward, with something happening at call number `call` (validation is not counted)."""

    def __init__(self, call: int, action: Callable[[Tensor], Tensor | None]) -> None:
        self.call, self.action, self.count = call, action, 0

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        rewards = super().__call__(images, prompts)
        if not torch.is_grad_enabled():
            return rewards
        self.count += 1
        changed = self.action(rewards) if self.count == self.call else None
        return rewards if changed is None else changed
