"""From a config to the memory plan of its run: what is to be done, the memory that there is, and the way to do it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from leapalign import families
from leapalign.engine.memory.available import device_available, host_available
from leapalign.engine.memory.sizes import parse_bytes, spell_bytes
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.planner import BudgetError, Planner
from leapalign.engine.planning.workload import Budget, Machine, Workload
from leapalign.errors import UsageError
from leapalign.families.source import transformer_config, vae_config
from leapalign.kernels.dispatch import reaches_device, triton
from leapalign.planning.reward_loads import reward_loads

if TYPE_CHECKING:
    from leapalign.config.keys import AlignConfig

SLACK = 0.03  # of what is free is left: for the allocators' gaps, and for a resumed run to find room for its plan
_KINDS = {"vram": "device memory", "ram": "host memory"}


def plan_run(
    config: AlignConfig, device: torch.device, *, workload: Workload | None = None, budget: Budget | None = None
) -> MemoryPlan:
    """The fastest plan for a run of this config with the memory that there is.

    Args:
        device: where the run computes.
        workload: None: `workload_of`.
        budget: None: `run_budget`.

    Raises:
        UsageError: nothing fits, or the models' shapes are not known.
    """
    found = planner_of(config, workload or workload_of(config, device), machine_of(device))
    given = _budget(config, device) if budget is None else _Given(budget, {}, [])
    try:
        return found.plan(given.budget)
    except BudgetError as error:
        raise refusal(error, config, given.free, device) from None


def run_budget(config: AlignConfig, device: torch.device, *, slack: float | None = None) -> tuple[Budget, list[str]]:
    """The least of what the config gives and what is free now, and a note on each key that gives more than there is.

    Of what is free the share `slack` is left; None: SLACK.
    On a CPU the plan's device memory is host memory too: it gets half of what there is, or `vram` if that is less.
    """
    found = _budget(config, device, slack)
    return found.budget, found.notes


@dataclass(frozen=True)
class _Given:
    """A budget, {key: bytes free on the machine} where that is the limit and not the config, and notes."""

    budget: Budget
    free: Mapping[str, int]
    notes: list[str]


def _budget(config: AlignConfig, device: torch.device, slack: float | None = None) -> _Given:
    slack = SLACK if slack is None else slack
    measured = {"vram": device_available(device), "ram": host_available()}
    free = {key: None if there is None else int(there * (1 - slack)) for key, there in measured.items()}
    limits: dict[str, int | None] = {}
    binding: dict[str, int] = {}
    notes: list[str] = []
    for key, there in free.items():
        text = getattr(config, key)
        wanted = None if text is None else parse_bytes(text, key)
        limits[key] = min((value for value in (wanted, there) if value is not None), default=None)
        if there is not None and (wanted is None or wanted > there):
            binding[key] = there
            if wanted is not None:
                notes.append(
                    f"{key} = {text}, but {spell_bytes(there)} are free{_where(key, device)}: planned for that"
                )
    whole = limits["ram"]
    if device.type != "cuda" and whole is not None:
        part = min(whole // 2, limits["vram"] or whole)
        limits = {"vram": part, "ram": whole - part}
    return _Given(Budget(limits["vram"], limits["ram"]), binding, notes)


def machine_of(device: torch.device) -> Machine:
    """Rates as assumed everywhere. Those for a CPU order its plans and predict no times.

    There no context takes memory, weights that stay are the store's own, and a copy takes the cores from the
    arithmetic: so a call is cheap beside a copy, and what needs no copies comes first.
    """
    if device.type == "cuda":
        return Machine()
    return Machine(device_base_bytes=0, seconds_per_call=1e-5, h2d_bytes_per_s=5e9, d2h_bytes_per_s=5e9)


def planner_of(config: AlignConfig, workload: Workload, machine: Machine) -> Planner:
    """Made once in a process for the same model, workload and machine."""
    return _planner(json.dumps(dict(transformer_config(config)), sort_keys=True), workload, machine)


@functools.lru_cache(maxsize=8)
def _planner(transformer: str, workload: Workload, machine: Machine) -> Planner:
    return Planner(json.loads(transformer), workload, machine)


def workload_of(config: AlignConfig, device: torch.device | None = None, *, own_reward: bool = False) -> Workload:
    """One optimizer step of this config; microbatch, streamed_mode and optimizer_device may be the planner's to choose.

    Args:
        device: that the run computes on, which says what kernels "auto" means; None: some GPU, of another machine.
        own_reward: another reward than the config's is used, of which nothing is known: the VAE alone is counted.

    Raises:
        UsageError: the executor is another one, or the models' shapes are not known.
    """
    return _workload(
        config,
        device,
        num_inference_steps=config.num_inference_steps,
        nested=config.alpha > 0,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mode=config.streamed_mode,
        optimizer_on=config.optimizer_device,
        optimizer=config.optimizer,
        clip=config.clip,
        master=config.master,
        ema=config.use_ema,
        rewards=reward_loads(_without_reward(config) if own_reward else config),
    )


def sampling_workload(config: AlignConfig, device: torch.device | None = None, *, scored: bool = True) -> Workload:
    """One batch of `train_batch_size` pictures, drawn, decoded and perhaps scored without gradients.

    Args:
        device: as for `workload_of`.

    Raises:
        UsageError: as `workload_of`.
    """
    return _workload(
        config,
        device,
        num_inference_steps=config.validation_inference_steps,
        legs=0,
        rewards=reward_loads(config if scored else _without_reward(config), gradients=False),
    )


def _without_reward(config: AlignConfig) -> AlignConfig:
    """With the packaged reward, which is small and not counted."""
    return config.model_copy(update={"reward": "shapes", "reward_model_name_or_path": None})


def _workload(config: AlignConfig, device: torch.device | None, **more: Any) -> Workload:
    if config.executor != "streamed":
        raise UsageError(
            f"executor = {config.executor} has no memory plan: it keeps everything on the device; use executor streamed"
        )
    family = families.of_transformer(transformer_config(config))
    length = config.max_sequence_length
    return Workload(
        batch=config.train_batch_size,
        resolution=config.resolution,
        patch=2 ** len(vae_config(config)["block_out_channels"]),
        text_tokens=family.text_tokens(length) if family else length,
        microbatch=config.microbatch,
        dtype=torch.bfloat16 if config.weight_dtype == "bf16" else torch.float32,
        kernels=kernels_of(config, device),
        attention=config.attention,
        **more,
    )


def kernels_of(config: AlignConfig, device: torch.device | None) -> Literal["triton", "torch"]:
    """The kernels of a run; "auto" is Triton where it reaches the device (None: a GPU of another machine).

    Raises:
        UsageError: Triton is asked for on a GPU, and not installed. On a CPU its operators' references in torch run.
    """
    if config.kernels == "torch" or (config.kernels == "auto" and device and not reaches_device(device)):
        return "torch"
    if device is not None and device.type == "cuda" and triton is None:
        raise UsageError("kernels = triton, but Triton is not installed; pip install triton, or use kernels torch")
    return "triton"


# ---- refusals ------------------------------------------------------------------------------------------------------


def refusal(
    error: BudgetError, config: AlignConfig, free: Mapping[str, int] | None = None, device: torch.device | None = None
) -> UsageError:
    """The planner's refusal in the config's keys.

    Args:
        free: {key: bytes} where the machine is the limit, and not what the config gives.
        device: of the run; None for a plan for any machine.
    """
    key, shared = error.name, device is not None and device.type != "cuda"
    given, limit = getattr(config, key), spell_bytes(error.limit)
    if given is not None and error.limit == parse_bytes(given, key):
        short = f"{key} = {given} is too little"
    elif shared and config.ram is not None and "ram" not in (free or {}):
        short = f"ram = {config.ram}, halved on a CPU, is too little"
    elif shared and free:
        short = f"ram = {config.ram or 'null'}: {limit}, a CPU's share of the host memory that is free, is too little"
    elif free and key in free:
        short = f"{key} = {given or 'null'}: {limit} of {_KINDS[key]} free{_where(key, device)} is too little"
    else:
        short = f"{key} = {limit} is too little"
    if not error.larger:
        return UsageError(
            f"{short}: {error.needs}; lower train_batch_size from {error.batch} to {error.workload.batch}"
        )
    whatever = f"{short}: {error.needs}, whatever train_batch_size"
    larger = dict(error.larger)
    if shared:  # both are host memory, halved where vram does not say otherwise
        both = [int(size) for size in (error.budget.vram, error.budget.ram) if size is not None]
        larger = {"ram": spell_bytes(2 * max(both))}
    give = " and ".join(f"{name} {size}" for name, size in larger.items())
    there = {name: size for name, size in (free or {}).items() if name in larger and parse_bytes(larger[name]) > size}
    if there:
        return UsageError(f"{whatever}; end other programs, or use a machine with {give}")
    return UsageError(f"{whatever}; give {give}")


def _where(key: str, device: torch.device | None) -> str:
    return f" on {device}" if key == "vram" and device is not None and device.type == "cuda" else " on this machine"
