"""AdamW with 8-bit moments over a streamed model's store, inside its backward pass or after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.optimizer.update import Gradient, Group, Kernels, Updater
from leapalign.engine.passes.autograd import GRAD, adopt_grads
from leapalign.engine.passes.protocols import Streamed

Clip = Literal["global", "block", "none"]
Master = Literal["stochastic", "residual", "float32"]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) whose moments are 8-bit codes and whose bfloat16 weights round stochastically.

    Memory on the host: 2.03 bytes a parameter for the moments, beside 2 for bfloat16 weights; 1 more for `residual`, 4
    more for a float32 master or average, 2 for a bfloat16 average.

    Made without parameters it takes all trainable ones of the model that it is given to:

        model = StreamedModel(transformer, plan, AdamW8bit(lr=1e-5))
        loss.backward()
        model.optimizer.step()

    With parameters or groups, as any torch optimizer, it takes those; learning rate schedulers change `param_groups`.

    `step` reads `parameter.grad`, which is held on the host for all weights, 2 bytes a bfloat16 parameter. With
    `fused_backward` every unit is updated inside `loss.backward()`, as soon as its gradient is finished, and `step`
    only closes the step. A trainer that knows its cotangents gives `StreamedModel.vjp` the sink `in_backward()`.

    Attributes:
        steps: updates done.
        skipped: steps left out because a gradient was not finite; weights and states were not touched.
        gradient_norm: of the last step, before clipping; with clip="block" or "none" over the units delivered.
    """

    def __init__(
        self,
        params: Iterable[Any] | None = None,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        *,
        placement: Literal["host", "device"] | None = None,
        clip: Clip = "global",
        max_grad_norm: float = 1.0,
        master: Master = "stochastic",
        ema_decay: float | None = None,
        seed: int = 0,
        fused_backward: bool = False,
        kernels: Kernels = "auto",
    ) -> None:
        """
        Args:
            params: parameters or groups of the transformer (before or after it is wrapped); None for all trainable.
            placement: where the update runs: "host", or "device" with states streamed in and out; None: as the model's
                plan says.
            clip: "global" scales all gradients by one factor so that their norm is at most `max_grad_norm`, which needs
                all of them before the first update; "block" clips each unit on its own; "none".
            master: how weights below float32 keep small updates: "stochastic" rounding, 8 more bits in a "residual", or
                a "float32" copy. No effect on float32 weights.
            ema_decay: keep an average of the weights, in their dtype with stochastic rounding; None for none.
            seed: of the rounding. Same seed and gradients, same bits.
            fused_backward: update inside `loss.backward()`, one a step, with clip="block" or "none". No `grad` is left.
            kernels: on the device: "triton" runs the fused kernels' operators, which take their references where Triton
                is not, "torch" the definition, and "auto" Triton where it is. The bits are the same. No effect on the
                host.

        Raises:
            ValueError: a setting out of range; the message names it.
        """
        _check(lr, betas, eps, weight_decay, clip, max_grad_norm, master, ema_decay, placement, kernels)
        if fused_backward and clip == "global":
            raise ValueError("AdamW8bit: fused_backward=True with clip='global', which needs every gradient before the "
                             "first update: use clip='block' or 'none'")  # fmt: skip
        self._defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        self._given = None if params is None else list(params)
        self._placement, self.clip, self.max_grad_norm = placement, clip, max_grad_norm
        self.master, self.ema_decay, self.seed = master, ema_decay, seed
        self.fused_backward, self.kernels = fused_backward, kernels
        self.steps = 0
        self.skipped = 0
        self.gradient_norm = math.nan
        self._fused: tuple[AbstractContextManager[InBackward], InBackward] | None = None
        self._model: Streamed | None = None

    @property
    def placement(self) -> Literal["host", "device"]:
        """Where the update runs."""
        return self._placement or self._bound().plan.optimizer_on

    @property
    def on_host(self) -> bool:
        """Where a sink wants its gradients."""
        return self.placement == "host"

    def bind(self, model: Streamed) -> None:
        """Take the model's parameters; called by StreamedModel.

        Raises:
            ValueError: bound already, no trainable parameter, or one that is not the model's.
        """
        if self._model is not None:
            raise ValueError("this AdamW8bit has a model already: make another one")
        if model.store.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"AdamW8bit updates float32 or bfloat16 weights, not {model.store.dtype}: convert, then wrap"
            )
        trainable = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        given = list(trainable) if self._given is None else self._given
        if not given:
            raise ValueError("AdamW8bit: the model has no parameter that requires grad")
        super().__init__(given, self._defaults)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self._names:
                    raise ValueError(f"AdamW8bit: a parameter of shape {tuple(parameter.shape)} is not the model's")
        self._model = model
        self._updater = Updater(
            model,
            placement=self.placement,
            master=self.master,
            ema=self.ema_decay is not None,
            kernels=self.kernels,
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._updater.states(self._names[parameter])

    # ---- after the backward pass -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from `parameter.grad`; none, and `skipped` grows, if a gradient is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        model = self._bound()
        if self.fused_backward:
            self._close_fused()
        else:
            adopt_grads(model)
            self.step_from(GRAD)
        return loss

    @contextmanager
    def fused(self) -> Iterator[InBackward]:
        """The sink of this step's `loss.backward()`, for whoever runs it; `step` then ends the step.

        Raises:
            RuntimeError: the step has had its backward pass.
        """
        if self._fused is not None:
            raise RuntimeError(
                "fused_backward=True takes one backward pass a step, and this is the second: the weights are new "
                "already; call step() first, or accumulate without it"
            )
        block = self.in_backward()
        sink = block.__enter__()
        try:
            yield sink
        except BaseException as error:
            block.__exit__(type(error), error, error.__traceback__)
            raise
        self._fused = block, sink

    def _close_fused(self) -> None:
        if self._fused is not None:
            (block, _), self._fused = self._fused, None
            try:
                block.__exit__(None, None, None)
            except FloatingPointError:  # nothing has changed, and `skipped` says so
                self.gradient_norm = math.inf

    def step_from(self, kind: str) -> bool:
        """One update from the sums of this kind that the model holds, which are spent by it.

        Returns:
            Whether weights changed: False if a gradient is not finite.
        """
        with self._bound().ledger.phase("update"):
            return self._step_from(kind)

    def _step_from(self, kind: str) -> bool:
        units = self._bound().sums.take(kind)
        wanted = self._groups()
        norms = {
            unit: math.sqrt(self._updater.square_sum(g for name, g in gradients.items() if name in wanted))
            for unit, gradients in units.items()
        }
        self.gradient_norm = math.sqrt(sum(norm * norm for norm in norms.values()))
        if not math.isfinite(self.gradient_norm):
            self.skipped += 1
            return False
        self.steps += 1
        for unit, gradients in units.items():
            norm = self.gradient_norm if self.clip == "global" else norms[unit]
            self._update(unit, gradients, wanted, norm)
        self._finish()
        return True

    # ---- inside the backward pass ----------------------------------------------------------------------------------

    @contextmanager
    def in_backward(self) -> Iterator[InBackward]:
        """A sink that updates each unit when it is delivered; the block is one step.

        Raises:
            ValueError: clip="global", which needs all gradients first.
            FloatingPointError: at the block's end, if the first unit's gradient was not finite: nothing has changed.
            RuntimeError: if a later one was not; some units are updated, and the state is to be restored.
        """
        if self.clip == "global":
            raise ValueError(
                "clip='global' needs every gradient before the first update: accumulate, then step_from('held'); "
                "or use clip='block' or 'none'"
            )
        self._bound()
        sink = InBackward(self, self._groups())
        self.steps += 1
        try:
            yield sink
        except BaseException:
            self._updater.finish()
            if not sink.updated:
                self.steps -= 1
            raise
        if sink.broken is not None:
            self.skipped += 1
            if sink.updated:
                raise RuntimeError(
                    f"the gradient of {sink.broken} is not finite, and {len(sink.updated)} units are updated already: "
                    "restore the last checkpoint; clip='global' never updates before all gradients are known"
                )
            self.steps -= 1
            raise FloatingPointError(f"the gradient of {sink.broken} is not finite")
        self.gradient_norm = math.sqrt(sink.squares)
        self._finish()

    # ---- states ----------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy states into the store's memory, in place: torch's own would cast the codes to the weights' dtype.

        Raises:
            ValueError: groups or states of another model or other settings.
        """
        groups, saved = state_dict["param_groups"], state_dict["state"]
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the saved optimizer has other parameter groups")
        for index, parameter in zip((i for group in groups for i in group["params"]), mine, strict=True):
            state = self.state[parameter]
            if saved[index].keys() != state.keys():
                raise ValueError(
                    f"the saved optimizer has states {', '.join(saved[index])} and this one {', '.join(state)}: "
                    "use its master and ema settings"
                )
            for key, value in saved[index].items():
                if isinstance(value, Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = value
        for group, other in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in other.items() if key != "params"})
        self.steps = max((int(state["step"]) for state in self.state.values()), default=0)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _bound(self) -> Streamed:
        assert self._model is not None, "AdamW8bit belongs to no Streamed yet"
        return self._model

    def _groups(self) -> dict[str, Group]:
        """{parameter name: its group's settings now}."""
        found: dict[str, Group] = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            settings = Group(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            found |= {self._names[parameter]: settings for parameter in group["params"]}
        return found

    def _update(self, unit: str, gradients: Mapping[str, Gradient], wanted: Mapping[str, Group], norm: float) -> None:
        limit = math.inf if self.clip == "none" else self.max_grad_norm
        scale = 1.0 if norm <= limit else limit / norm
        chosen = {name: gradient for name, gradient in gradients.items() if name in wanted}
        self._updater.update(
            unit, chosen, wanted, step=self.steps, scale=scale, seed=self.seed, ema_decay=self.ema_decay
        )

    def _finish(self) -> None:
        self._updater.finish()
        for state in self.state.values():
            state["step"] = self.steps


class InBackward:
    """The sink of `AdamW8bit.in_backward`."""

    def __init__(self, optimizer: AdamW8bit, groups: Mapping[str, Group]) -> None:
        self.on_host = optimizer.on_host
        self.updated: list[str] = []
        self.broken: str | None = None
        self.squares = 0.0
        self._optimizer, self._groups = optimizer, groups

    @torch.no_grad()
    def __call__(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct]) -> None:
        if self.broken is not None:
            return
        wanted = (gradient for name, gradient in gradients.items() if name in self._groups)
        squares = self._optimizer._updater.square_sum(wanted)
        if not math.isfinite(squares):
            self.broken = unit
            return
        self.squares += squares
        self.updated.append(unit)
        self._optimizer._update(unit, gradients, self._groups, math.sqrt(squares))


def _check(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, clip: str, max_grad_norm: float,
    master: str, ema_decay: float | None, placement: str | None, kernels: str,
) -> None:  # fmt: skip
    for name, value, fits, limit in (
        ("lr", lr, 0 <= lr < math.inf, "at least 0"),
        ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        ("eps", eps, 0 < eps < math.inf, "above 0"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "at least 0"),
        ("max_grad_norm", max_grad_norm, max_grad_norm > 0, "above 0"),
        ("ema_decay", ema_decay, ema_decay is None or 0 <= ema_decay < 1, "in [0, 1), or None for no average"),
        ("clip", clip, clip in ("global", "block", "none"), "global, block or none"),
        ("master", master, master in ("stochastic", "residual", "float32"), "stochastic, residual or float32"),
        ("placement", placement, placement in ("host", "device", None), "host or device, or None for the plan's"),
        ("kernels", kernels, kernels in ("auto", "triton", "torch"), "auto, triton or torch"),
    ):
        if not fits:
            raise ValueError(f"AdamW8bit: {name}={value!r} must be {limit}")
