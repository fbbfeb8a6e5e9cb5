"""The state of a run with the engine's 8-bit AdamW: everything is in the model's store, and saved from there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leapalign.config.keys import AlignConfig
from leapalign.engine.export import save_model, saved_buffers, swapped
from leapalign.engine.memory import checkpoint as checkpoints
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.errors import UsageError
from leapalign.kernels.host import native as host
from leapalign.run.state import changed_settings, learning_rate, new_checkpoint, no_average, read_state

AVERAGE = "ema"  # its kind in the store


class HalfUpdatedError(RuntimeError):
    """A step that ended with some units updated and others not: the weights of no step.

    Attributes:
        reason: why the step is to be left out.
    """

    def __init__(self, reason: str, updated: int) -> None:
        super().__init__(f"{reason}, after {updated} units were updated")
        self.reason = reason


class StreamedState:
    """As `leapalign.run.state.TrainState`, after `step` optimizer steps.

    In host memory, bytes a parameter, with bfloat16 weights: 2 for them, 2.03 for the moments, 1 for a residual or 4
    for a float32 master, 2 for the average if `use_ema`; with clip="global" or accumulated passes 2 for held gradients.
    float32 weights take 4 for each of weights, average and held gradients.

    Attributes:
        step: optimizer steps done, skipped ones included.
        skipped: steps without an update, because something was not finite.
        parameters: {name: parameter}.
    """

    def __init__(self, model: StreamedModel, config: AlignConfig) -> None:
        self.config, self.model = config, model
        self.parameters: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        self.optimizer = model.optimizer = AdamW8bit(
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            clip=config.clip,
            max_grad_norm=config.max_grad_norm,
            master=config.master,
            ema_decay=config.ema_decay if config.use_ema else None,
            seed=config.seed,
            kernels=config.kernels,
        )
        self.optimizer.bind(model)
        try:
            host.configure(threads=config.host_threads, cores=config.host_cores)
        except ValueError as error:
            raise UsageError(f"host_cores = {config.host_cores}: {error}; or leave host_cores out") from None
        self.step = 0
        self.skipped = 0

    @property
    def holds(self) -> bool:
        """Whether all gradients are held on the host before the first weight changes."""
        return self.config.clip == "global" or self.config.gradient_accumulation_steps > 1

    @contextmanager
    def delivery(self) -> Iterator[dict[str, Any]]:
        """What `alignment_gradients` is to do with its gradients inside the block: hold them, or update by them.

        Raises:
            FloatingPointError: a gradient is not finite; nothing has changed.
            HalfUpdatedError: one that comes after the first update is not.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        if self.holds:
            yield {"hold": True}
            return
        try:
            with self.optimizer.in_backward() as sink:
                yield {"sink": sink}
        except RuntimeError as error:
            if sink.broken is None:
                raise
            raise HalfUpdatedError(f"the gradient of {sink.broken} is not finite", len(sink.updated)) from error

    def update(self, grads: dict[str, Tensor]) -> float:
        """Clip, AdamW, average, if `delivery` has not done so. Returns the gradient's norm before clipping.

        Args:
            grads: empty.

        Raises:
            FloatingPointError: a held gradient is not finite; nothing has changed.
        """
        assert not grads, "the streamed optimizer takes no whole gradients"
        if self.holds:
            self.model.sums.fill()  # a batch without an active sample is a step with gradient zero
            if not self.optimizer.step_from("held"):
                raise FloatingPointError("gradient norm is not finite")
        return self.optimizer.gradient_norm

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the transformer has the weights that the run delivers: the average, if there is one."""
        return swapped(self.model, AVERAGE) if self.config.use_ema else nullcontext()

    def save(self, output_dir: Path) -> Path:
        """Write checkpoint-<step>/, whole or not at all; delete the oldest beyond `checkpoints_total_limit`.

        Everything is written from where it is in the store.
        """
        with new_checkpoint(output_dir, self.config, self.step, self.skipped) as folder:
            save_model(self.model, folder / "transformer")
            if self.config.use_ema:
                self.export(folder / "transformer_ema")
            optimizer = folder / "optimizer"
            optimizer.mkdir()
            checkpoints.save_tensors(self._states(), optimizer, stem="optimizer")
            (optimizer / "optimizer.json").write_text(json.dumps({"steps": self.optimizer.steps}) + "\n")
        return checkpoints.checkpoint_folder(output_dir, self.step)

    def export(self, folder: Path) -> None:
        """Write what the run delivers, the average or the weights, as a diffusers folder."""
        save_model(self.model, folder, kind=AVERAGE if self.config.use_ema else "weights")

    @torch.no_grad()
    def begin_again(self) -> None:
        """Take the weights that the run began with from the model's files, and states of step 0."""
        model, store = self.model, self.model.store
        model.streamer.drain()
        model.reload()
        for values in self._states().values():
            values.zero_()
        for unit in store.units:
            for kind in ("master", AVERAGE):  # they begin at the weights
                if store.holds(kind):
                    store.region(unit, kind).copy_(store.region(unit))
        self._set_steps(0)
        self.step = self.skipped = 0

    @torch.no_grad()
    def restore(self, checkpoint: Path) -> list[str]:
        """Take everything from a checkpoint, bit for bit, straight into the store.

        Returns:
            Warnings: what makes the run another one than it would have been.

        Raises:
            ValueError: the checkpoint is another model's.
        """
        state, warnings, store = read_state(checkpoint), [], self.model.store
        self.model.streamer.drain()
        buffers = saved_buffers(self.model)
        checkpoints.load_into({**self.parameters, **buffers}, checkpoints.model_files(checkpoint / "transformer"))
        checkpoints.load_into(self._states(), sorted((checkpoint / "optimizer").glob("optimizer-*.safetensors")))
        average = checkpoints.model_files(checkpoint / "transformer_ema")
        if self.config.use_ema and average:
            views = {name: view for unit in store.units for name, view in store.views(unit, AVERAGE).items()}
            checkpoints.load_into({**views, **buffers}, average)
        elif self.config.use_ema:
            for unit in store.units:
                store.region(unit, AVERAGE).copy_(store.region(unit))
            warnings.append(no_average(checkpoint, state["step"]))
        for unit in store.units:
            self.model.weights_changed(unit)
        self._set_steps(json.loads((checkpoint / "optimizer" / "optimizer.json").read_text())["steps"])
        self.step, self.skipped = state["step"], state["skipped"]
        return [*warnings, *changed_settings(self.config, checkpoint)]

    def _set_steps(self, steps: int) -> None:
        self.optimizer.steps = steps
        for own in self.optimizer.state.values():
            own["step"] = steps

    def _states(self) -> dict[str, Tensor]:
        """{parameter/state: view of the store}: codes and scales of the moments, residual or master."""
        return {
            f"{name}/{kind}": values
            for name, parameter in self.parameters.items()
            for kind, values in self.optimizer.state[parameter].items()
            if isinstance(values, Tensor) and kind != AVERAGE
        }
