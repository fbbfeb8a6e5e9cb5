"""What changes during a run: weights, optimizer states, average and step; updated, saved and restored here.

`TrainState` has torch's AdamW in float32, `leapalign.run.streamed_state.StreamedState` the engine's 8-bit one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leapalign.config.keys import AlignConfig, DataKeys, MethodKeys, OptimizerKeys
from leapalign.engine.export import save_model
from leapalign.engine.memory import checkpoint as checkpoints
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.average import EMA
from leapalign.errors import UsageError

FORMAT = ("optimizer", "weight_dtype", "master")  # keys that say what a checkpoint holds


class TrainState:
    """The state of a run after `step` optimizer steps.

    On the device of the transformer's weights (a StreamedModel's are in host memory), float32: 4 bytes a parameter for
    the weights, 8 for AdamW's moments, 4 for the average if `use_ema`, and 4 for the gradients while `update` runs.

    Attributes:
        step: optimizer steps done, skipped ones included.
        skipped: steps without an update, because something was not finite.
        parameters: {name: parameter}.
    """

    def __init__(self, transformer: torch.nn.Module, config: AlignConfig) -> None:
        self.config = config
        self.transformer = transformer
        self.parameters: dict[str, torch.nn.Parameter] = dict(transformer.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            fused=True,  # one pass over weights and moments, without model-sized temporaries
        )
        self.ema = EMA(self.parameters, config.ema_decay) if config.use_ema else None
        self.step = 0
        self.skipped = 0

    def delivery(self) -> AbstractContextManager[dict[str, Any]]:
        """What `alignment_gradients` is to do with its gradients inside the block: return them, for `update`."""
        return nullcontext({})

    def update(self, grads: dict[str, Tensor]) -> float:
        """Clip, AdamW, average: the one place where weights change. Returns the gradient's norm before clipping.

        Args:
            grads: {name: gradient} of every parameter, averaged over the global batch; scaled in place by the clipping.

        Raises:
            FloatingPointError: the norm is not finite; nothing has changed.
        """
        norm = torch.nn.utils.get_total_norm(grads.values())
        if not torch.isfinite(norm):
            raise FloatingPointError("gradient norm is not finite")
        for name, parameter in self.parameters.items():
            parameter.grad = grads[name]
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.parameters)
        return float(norm)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the transformer has the weights that the run delivers: the average, if there is one."""
        return self.ema.swapped(self.parameters) if self.ema else nullcontext()

    def save(self, output_dir: Path) -> Path:
        """Write checkpoint-<step>/, whole or not at all; delete the oldest beyond `checkpoints_total_limit`."""
        with new_checkpoint(output_dir, self.config, self.step, self.skipped) as folder:
            self._write(folder / "transformer")
            if self.ema:
                self.export(folder / "transformer_ema")
            checkpoints.save_optimizer(self.optimizer, self._names(), folder / "optimizer")
        return checkpoints.checkpoint_folder(output_dir, self.step)

    def export(self, folder: Path) -> None:
        """Write what the run delivers, the average or the weights, as a diffusers folder."""
        with self.averaged():
            self._write(folder)

    def _write(self, folder: Path) -> None:
        if isinstance(self.transformer, StreamedModel):
            save_model(self.transformer, folder)
        else:
            save: Any = self.transformer  # a diffusers model
            save.save_pretrained(folder)

    def restore(self, checkpoint: Path) -> list[str]:
        """Take everything from a checkpoint, bit for bit.

        Returns:
            Warnings: what makes the run another one than it would have been.

        Raises:
            ValueError: the checkpoint is another model's.
        """
        state, warnings = read_state(checkpoint), []
        checkpoints.load_into(self.parameters, checkpoints.model_files(checkpoint / "transformer"))
        checkpoints.load_optimizer(self.optimizer, self._names(), checkpoint / "optimizer")
        average = checkpoints.model_files(checkpoint / "transformer_ema")
        if self.ema and average:
            checkpoints.load_into(self.ema.tensors, average)
        elif self.ema:
            self.ema = EMA(self.parameters, self.config.ema_decay)
            warnings.append(no_average(checkpoint, state["step"]))
        self.step, self.skipped = state["step"], state["skipped"]
        return [*warnings, *changed_settings(self.config, checkpoint)]

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.parameters.items()}


@contextmanager
def new_checkpoint(output_dir: Path, config: AlignConfig, step: int, skipped: int) -> Iterator[Path]:
    """A folder to write into that becomes checkpoint-<step>/ at the block's end, whole or not at all.

    The oldest beyond `checkpoints_total_limit` are then deleted.
    """
    state = {"step": step, "skipped": skipped, "settings": course(config)}
    with checkpoints.atomic_folder(checkpoints.checkpoint_folder(output_dir, step)) as folder:
        yield folder
        (folder / checkpoints.STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
    checkpoints.prune(output_dir, config.checkpoints_total_limit)


def course(config: AlignConfig) -> dict[str, Any]:
    """The settings that decide how the weights go, and so should not change on the way."""
    other = {"cache_dir", "microbatch", "max_train_steps", "optimizer_device", "host_threads", "host_cores"}
    keys = {key for section in (DataKeys, MethodKeys, OptimizerKeys) for key in section.model_fields} - other
    return {key: value for key, value in config.model_dump(mode="json").items() if key in keys}


def changed_settings(config: AlignConfig, checkpoint: Path) -> list[str]:
    """A warning if the checkpoint's run had other settings; keys that are newer than it had their default then."""
    saved, fields = read_state(checkpoint)["settings"], AlignConfig.model_fields
    changed = [
        f"{key} {before} -> {now}"
        for key, now in course(config).items()
        if (before := saved.get(key, fields[key].default)) != now
    ]
    return [f"settings differ from those of {checkpoint}: {', '.join(changed)}"] if changed else []


def check_format(config: AlignConfig, checkpoint: Path) -> None:
    """UsageError if a run of this config cannot go on from the checkpoint's states; before anything is written."""
    saved = read_state(checkpoint)["settings"]
    for key in FORMAT:
        before = saved.get(key, AlignConfig.model_fields[key].default)
        if before != getattr(config, key):
            raise UsageError(
                f"{key} = {getattr(config, key)}, but {checkpoint} holds the states of {key} = {before}; "
                f"go on with {key} {before}, or start a new run from its transformer"
            )


def no_average(checkpoint: Path, step: int) -> str:
    """The warning where a run that averages goes on from one that did not."""
    return f"{checkpoint} has no average; it starts at the weights of step {step}"


def learning_rate(config: AlignConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 1; a pure function, so a resume needs no state.

    Warm-up rises linearly and reaches `learning_rate` at step `lr_warmup_steps`; linear and cosine then fall towards 0,
    which they would reach one step after the last.
    """
    done, warmup = step - 1, config.lr_warmup_steps
    if done < warmup:
        return config.learning_rate * step / warmup
    progress = (done - warmup) / max(1, config.max_train_steps - warmup)
    if config.lr_scheduler == "linear":
        return config.learning_rate * (1 - progress)
    if config.lr_scheduler == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of a checkpoint's trainer_state.json: step, skipped, settings."""
    state: dict[str, Any] = json.loads((checkpoint / checkpoints.STATE_FILE).read_text())
    return state
