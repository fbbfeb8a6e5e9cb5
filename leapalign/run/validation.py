"""Looking at a run: scores and pictures of the held-out prompts at the start, on the way and at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from leapalign.config.keys import AlignConfig
from leapalign.data.prompts import Prompt
from leapalign.engine.memory.checkpoint import write_atomically
from leapalign.evaluation.pictures import before_after, grid, save
from leapalign.evaluation.scores import Embeddings, Evaluation, evaluate
from leapalign.families.pipeline import FlowPipeline
from leapalign.rewards.protocol import RewardModel
from leapalign.run.tracking import Tracking

BASE_FILE = "step-000000.safetensors"


class Validation:
    """Evaluates the pipeline as it is when called, and files the results in samples/.

    It never ends a run: what goes wrong is told as a warning, and the result is None.
    """

    def __init__(
        self,
        pipeline: FlowPipeline,
        store: Embeddings,
        prompts: Sequence[Prompt],
        reward: RewardModel,
        config: AlignConfig,
        tracking: Tracking,
    ) -> None:
        self._parts = (pipeline, store, prompts, reward, config)
        self._prompts, self._tracking = prompts, tracking
        self._folder = Path(config.output_dir) / "samples"
        self._images_per_prompt = config.validation_images_per_prompt

    def base(self) -> Evaluation | None:
        """The weights that the run starts from, evaluated once: a resumed run reads what was found then."""
        record = self._folder / BASE_FILE
        if record.is_file():
            found = Evaluation.load(record)
            if (found.prompts, found.rewards.shape[1]) == ([p.text for p in self._prompts], self._images_per_prompt):
                return found
        result = self.run(0)
        if result:
            result.save(record)
        return result

    def run(self, step: int) -> Evaluation | None:
        """Evaluate, and write step-<step>.png and .json; None without prompts."""
        if not self._prompts:
            return None
        try:
            result = evaluate(*self._parts)
            picture = self._folder / f"step-{step:06d}.png"
            captions = [f"{result.prompts[p]} ({result.note(i)})" for i, p in enumerate(result.shown_prompts)]
            save(grid(result.shown, captions), picture)
            write_atomically(picture.with_suffix(".json"), json.dumps(result.as_dict(), indent=1) + "\n")
        except Exception as error:
            self._tracking.warn(f"validation after step {step} failed: {type(error).__name__}: {error}")
            return None
        scores = {"reward": result.reward.mean}
        if result.accuracy:
            scores["accuracy"] = result.accuracy.mean
        self._tracking.validation(step, scores, picture)
        return result

    def compare(self, before: Evaluation | None, after: Evaluation | None) -> Path | None:
        """Write before_after.png: the same prompts and the same noise, left before and right after."""
        if before is None or after is None:
            return None
        notes = [(before.note(i), after.note(i)) for i in range(len(after.shown))]
        prompts = [after.prompts[index] for index in after.shown_prompts]
        path = self._folder / "before_after.png"
        try:
            save(before_after(before.shown, after.shown, prompts, notes), path)
        except Exception as error:
            self._tracking.warn(f"{path} could not be drawn: {type(error).__name__}: {error}")
            return None
        return path
