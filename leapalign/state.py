"""What changes during a run: weights, optimizer states, average and step; updated, saved and restored here."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leapalign.engine import checkpoint as checkpoints
from leapalign.engine.ema import EMA
from leapalign.keys import AlignConfig, DataKeys, MethodKeys, OptimizerKeys

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from leapalign.engine.streamed import StreamedModel


class TrainState:
    """The state of a run after `step` optimizer steps.

    On the device of the transformer's weights (a StreamedModel's are in host memory), float32: 4 bytes a parameter for
    the weights, 8 for AdamW's moments, 4 for the average if `use_ema`, and 4 for the gradients while `update` runs.

    Attributes:
        step: optimizer steps done, skipped ones included.
        skipped: steps without an update, because something was not finite.
        parameters: {name: parameter}.
    """

    def __init__(self, transformer: FluxTransformer2DModel | StreamedModel, config: AlignConfig) -> None:
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
        checkpoint = checkpoints.checkpoint_folder(output_dir, self.step)
        state = {"step": self.step, "skipped": self.skipped, "settings": self._course()}
        with checkpoints.atomic_folder(checkpoint) as folder:
            self.transformer.save_pretrained(folder / "transformer")
            if self.ema:
                with self.averaged():
                    self.transformer.save_pretrained(folder / "transformer_ema")
            checkpoints.save_optimizer(self.optimizer, self._names(), folder / "optimizer")
            (folder / checkpoints.STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
        checkpoints.prune(output_dir, self.config.checkpoints_total_limit)
        return checkpoint

    def restore(self, checkpoint: Path) -> list[str]:
        """Take everything from a checkpoint, bit for bit.

        Returns:
            Warnings: what makes the run another one than it would have been.

        Raises:
            ValueError: the checkpoint is another model's.
        """
        state = read_state(checkpoint)
        warnings = []
        checkpoints.load_into(self.parameters, checkpoints.model_files(checkpoint / "transformer"))
        checkpoints.load_optimizer(self.optimizer, self._names(), checkpoint / "optimizer")
        average = checkpoints.model_files(checkpoint / "transformer_ema")
        if self.ema and average:
            checkpoints.load_into(self.ema.tensors, average)
        elif self.ema:
            self.ema = EMA(self.parameters, self.config.ema_decay)
            warnings.append(f"{checkpoint} has no average; it starts at the weights of step {state['step']}")
        self.step, self.skipped = state["step"], state["skipped"]
        saved = state["settings"]
        changed = [f"{key} {saved.get(key)} -> {new}" for key, new in self._course().items() if saved.get(key) != new]
        if changed:
            warnings.append(f"settings differ from those of {checkpoint}: {', '.join(changed)}")
        return warnings

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.parameters.items()}

    def _course(self) -> dict[str, Any]:
        """The settings that decide how the weights go, and so should not change on the way."""
        other = {"cache_dir", "microbatch", "max_train_steps"}
        keys = {key for section in (DataKeys, MethodKeys, OptimizerKeys) for key in section.model_fields} - other
        return {key: value for key, value in self.config.model_dump(mode="json").items() if key in keys}


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
