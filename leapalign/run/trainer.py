"""The alignment run: draw, differentiate, update, report, validate, save; to be stopped and resumed at any step."""

from __future__ import annotations

import shlex
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leapalign.config.loading import AlignConfig, check_output_dir, save_config
from leapalign.data.prompts import load_prompts
from leapalign.engine.memory import checkpoint as checkpoints
from leapalign.engine.model import StreamedModel
from leapalign.errors import UsageError
from leapalign.evaluation.scores import Evaluation, table
from leapalign.families.source import resolve_device
from leapalign.gradients import alignment_gradients
from leapalign.method.draws import draw_noise, draw_prompts, draw_steps
from leapalign.method.leapalign import LeapAlign
from leapalign.method.task import GradientResult
from leapalign.planning.configured import configured_pipeline, configured_reward, prompt_store
from leapalign.planning.run_plan import RunPlan, memory_error, plan_of_run
from leapalign.rewards.latent import LatentReward
from leapalign.rewards.protocol import RewardModel
from leapalign.run.interruption import Interruption
from leapalign.run.model_card import model_card
from leapalign.run.state import TrainState, check_format, learning_rate, read_state
from leapalign.run.streamed_state import HalfUpdatedError, StreamedState
from leapalign.run.tracking import Tracking
from leapalign.run.validation import Validation

MOST_SKIPPED = 10  # steps in a row without a finite gradient: the run is lost, and going on would hide it


@dataclass(frozen=True)
class Summary:
    """What a run has come to; its text is the before/after table and where to find the rest.

    Attributes:
        step: optimizer steps done.
        before, after: scores on the validation prompts; None without them, or if the run was interrupted.
        picture: samples/before_after.png, if it was drawn.
        result: the transformer/ folder, or the checkpoint of an interrupted run.
    """

    step: int
    result: Path
    before: Evaluation | None = None
    after: Evaluation | None = None
    picture: Path | None = None

    def __str__(self) -> str:
        scores = [table(self.after, self.before), ""] if self.after else []
        picture = [f"before/after: {self.picture}"] if self.picture else []
        return "\n".join([*scores, *picture, f"after {self.step} steps: {self.result}"])


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        interrupted: whether a signal stopped it before its last step.
        resume_command: what goes on with it, then; None for a finished run.
        summary: the result; print it.
    """

    interrupted: bool
    resume_command: str | None
    summary: Summary


class Trainer:
    """Aligns all parameters of a pipeline's transformer with a reward, as `config` says.

    A step is a function of the state and of (seed, step, sample) alone: a run that is killed and resumed ends with the
    same bits as one that was not.
    """

    def __init__(self, config: AlignConfig, *, reward: RewardModel | None = None) -> None:
        """
        Args:
            reward: a reward model of your own, instead of the one that the config names.
        """
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.method = LeapAlign(config.alpha, config.tau, config.threshold)
        self._given_reward = reward
        self._streams = config.executor == "streamed"
        self.planned: RunPlan | None = None
        self._skipped_in_a_row = 0
        self._base: Path | None = None  # the checkpoint that the run went on from or wrote last
        self._left_out: dict[int, str] = {}  # {step: why}: a gradient was not finite after others had been applied
        self._exceeded = False

    def run(self) -> Outcome:
        """Train to `max_train_steps`, or until SIGINT or SIGTERM, which finish the step and write a checkpoint.

        Raises:
            UsageError: the folder holds a run already, something that the config names is not there, the machine has
                too little memory, or the run has diverged.
        """
        config = self.config
        start = check_output_dir(config)
        if start is not None:
            check_format(config, start)
        try:
            self._load(start)
            with self._open(start):
                self._begin(start)
                with Interruption() as interruption:
                    while self.state.step < config.max_train_steps and not interruption.requested:
                        self._advance()
                    return self._finish() if self.state.step >= config.max_train_steps else self._interrupted()
        except (MemoryError, RuntimeError) as error:
            if told := memory_error(error, config, self.planned):
                raise told from error
            raise

    # ---- one step --------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One step, and what is due after it.

        A step that could not be left out whole goes back to the checkpoint before it (or the run's beginning), and is
        left out when the run comes there again.
        """
        config = self.config
        try:
            row = self._train_step()
        except HalfUpdatedError as error:
            self._go_back(error)
            return
        self.tracking.log(row)
        self._refuse_divergence(row)
        if self.state.step % config.checkpointing_steps == 0:
            self._save_checkpoint()
        if self.state.step % config.validation_steps == 0 and self.state.step < config.max_train_steps:
            self._validate()

    def _go_back(self, error: HalfUpdatedError) -> None:
        """Weights, states and rows of the checkpoint that this run has come from, or of its beginning."""
        assert isinstance(self.state, StreamedState), "only it updates before all gradients are known"
        step = self.state.step
        self._left_out[step] = error.reason
        if self._base is not None:
            self.state.restore(self._base)
        else:
            self.state.begin_again()
        self.tracking.rewind(self.state.step)
        self._skipped_in_a_row = 0
        self.tracking.warn(f"step {step}: {error}; once more from step {self.state.step}, without this one")

    def _train_step(self) -> dict[str, Any]:
        """One optimizer step over the global batch; returns its row of metrics.jsonl.

        A reward or a gradient that is not finite leaves weights, optimizer states and average as they are.

        Raises:
            HalfUpdatedError: a gradient was found not to be finite when others had been applied already.
        """
        start = time.perf_counter()
        self.state.step += 1
        seconds: dict[str, float] = {}
        row: dict[str, Any] = {"step": self.state.step, "skipped": False, "reason": None}
        if self.ledger:
            self.ledger.clear()
        try:
            if self.state.step in self._left_out:
                raise FloatingPointError(self._left_out[self.state.step])
            with self.state.delivery() as how:
                grads, scores = self._gradients(seconds, **how)
            update_start = time.perf_counter()
            with self.ledger.phase("update") if self.ledger and grads else nullcontext():
                grad_norm = self.state.update(grads)
            seconds["optimizer"] = time.perf_counter() - update_start
            row |= {**scores, "grad_norm": grad_norm}
            self._skipped_in_a_row = 0
        except FloatingPointError as error:
            row |= dict.fromkeys(("reward", "loss", "d_j", "d_0", "active", "grad_norm"))
            row |= {"skipped": True, "reason": str(error)}
            self.state.skipped += 1
            self._skipped_in_a_row += 1
        seconds["total"] = time.perf_counter() - start
        row |= {"lr": learning_rate(self.config, self.state.step), "seconds": seconds}
        return {**row, **self._memory()}

    def _memory(self) -> dict[str, Any]:
        """What the step took beside the plan; a phase that took more than planned is told, once a run."""
        if self.ledger is None:
            return {}
        exceeded = self.ledger.exceeded()
        if exceeded and not self._exceeded:
            self._exceeded = True
            self.tracking.warn(exceeded[0])
        return self.ledger.row(self.state.step)

    def _gradients(self, seconds: dict[str, float], **how: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gradients and scores averaged over the global batch; each phase's time is added to `seconds`.

        Samples are numbered through the global batch, so noise and pairs do not depend on how it is split.

        Args:
            how: where the gradients go, if they are not to be returned; see `alignment_gradients`.

        Raises:
            FloatingPointError: a reward or its gradient is not finite.
        """
        size, passes = self.config.train_batch_size, self.config.gradient_accumulation_steps
        order = draw_prompts(self.config.seed, self.state.step - 1, size * passes, len(self.train_prompts))
        grads: dict[str, Tensor] = {}
        results: list[GradientResult] = []
        for first in range(0, size * passes, size):
            texts = [self.train_prompts[index] for index in order[first : first + size]]
            result = self._alignment_gradients(range(first, first + size), texts, scale=1 / passes, **how)
            for phase, value in result.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + value
            if grads and result.grads:
                torch._foreach_add_(list(grads.values()), [result.grads[name] for name in grads])
            else:
                grads.update(result.grads)
            result.grads.clear()  # as large as the model: only the sum is kept
            results.append(result)
        rewards = torch.cat([result.rewards for result in results])
        return grads, {
            "reward": float(rewards.mean()),
            "loss": float(torch.stack([result.loss for result in results]).mean()),
            "d_j": float(torch.cat([result.d_j for result in results]).mean()),
            "d_0": float(torch.cat([result.d_0 for result in results]).mean()),
            "active": float((rewards < self.config.threshold).float().mean()),
        }

    def _alignment_gradients(self, samples: range, texts: list[str], **how: Any) -> GradientResult:
        """Of one pass: the samples with these numbers in the global batch, and their prompts."""
        config, pipeline = self.config, self.pipeline
        noise = draw_noise(config.seed, self.state.step, samples, pipeline.latent_shape(config.resolution))
        return alignment_gradients(
            pipeline.transformer,
            pipeline.conditioning(self.store.batch(texts), config.resolution, config.guidance_scale),
            noise.to(pipeline.home),
            pipeline.sigmas(config.num_inference_steps, config.resolution),
            LatentReward(pipeline, self.reward, texts),
            self.method,
            pairs=draw_steps(self.method, config.seed, self.state.step, samples, config.num_inference_steps),
            executor=config.executor,
            microbatch=None if self.planned else config.microbatch,
            **how,
        )

    def _refuse_divergence(self, row: dict[str, Any]) -> None:
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise UsageError(
                f"{MOST_SKIPPED} steps in a row up to step {self.state.step} had no finite gradient ({row['reason']}); "
                f"lower learning_rate = {self.config.learning_rate:g} or mend the reward, then go on from a checkpoint"
            )

    # ---- before and after ------------------------------------------------------------------------------------------

    def _load(self, start: Path | None = None) -> None:
        """Everything that the run holds; the text encoders have come and gone when this returns."""
        config = self.config
        if self._streams:
            own = self._given_reward is not None
            self.planned = plan_of_run(config, resolve_device(config.device), start, own_reward=own)
        validation = config.validation_prompts
        self.train_prompts = [prompt.text for prompt in load_prompts(config.train_prompts, key="train_prompts")]
        self.validation_prompts = load_prompts(validation, key="validation_prompts") if validation is not None else []
        self.store = prompt_store(config, [*self.train_prompts, *(prompt.text for prompt in self.validation_prompts)])
        self.pipeline = configured_pipeline(config, plan=self.planned.plan if self.planned else None)
        self.pipeline.latent_shape(config.resolution)  # refuses a resolution that the pipeline cannot make
        if config.gradient_checkpointing and config.executor == "autograd":  # streamed always recomputes the blocks
            self.pipeline.transformer.enable_gradient_checkpointing()
        self.reward = self._given_reward or configured_reward(config)
        self.state: TrainState | StreamedState
        if config.optimizer == "adamw8bit":
            assert isinstance(self.pipeline.transformer, StreamedModel), "the config streams with this optimizer"
            self.state = StreamedState(self.pipeline.transformer, config)
        else:
            self.state = TrainState(self.pipeline.transformer, config)
        transformer = self.pipeline.transformer
        self.ledger = transformer.ledger if isinstance(transformer, StreamedModel) else None

    def _open(self, start: Path | None) -> Tracking:
        """Take the output folder: from here on it holds a run."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.clean(self.output_dir)
        save_config(self.config, self.output_dir)
        self.tracking: Tracking = Tracking(self.config, read_state(start)["step"] if start else 0)
        if self.planned:
            self.planned.save(self.output_dir)
            for note in self.planned.notes:
                self.tracking.note(note)
        return self.tracking

    def _begin(self, start: Path | None) -> None:
        """Score the base weights, then take those of the checkpoint, if there is one."""
        parts = (self.pipeline, self.store, self.validation_prompts, self.reward, self.config)
        self.validation = Validation(*parts, self.tracking)
        self.before = self.validation.base()
        if start is not None:
            self._base = start
            for warning in self.state.restore(start):
                self.tracking.warn(warning)

    def _validate(self) -> Evaluation | None:
        with self.state.averaged():
            return self.validation.run(self.state.step)

    def _save_checkpoint(self) -> Path:
        self.tracking.sync()
        self._base = self.state.save(self.output_dir)
        return self._base

    def _interrupted(self) -> Outcome:
        saved = checkpoints.checkpoint_folder(self.output_dir, self.state.step)
        if saved not in checkpoints.list_checkpoints(self.output_dir):
            self._save_checkpoint()
        return Outcome(True, self._resume_command(), Summary(self.state.step, saved))

    def _resume_command(self) -> str:
        return f"leapalign align {shlex.quote(str(self.output_dir / 'config.yaml'))} --resume_from_checkpoint latest"

    def _finish(self) -> Outcome:
        """transformer/ with the average (or the weights), the last validation, the picture and the model card."""
        with checkpoints.atomic_folder(self.output_dir / "transformer") as folder:
            self.state.export(folder)
        after = self._validate()
        picture = self.validation.compare(self.before, after)
        card = model_card(
            self.config,
            self.pipeline.family,
            name=self.config.run_name or self.output_dir.resolve().name,
            results=table(after, self.before) if after else None,
            skipped=self.state.skipped,
        )
        checkpoints.write_atomically(self.output_dir / "README.md", card)
        return Outcome(
            False, None, Summary(self.state.step, self.output_dir / "transformer", self.before, after, picture)
        )
