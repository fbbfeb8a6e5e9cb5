"""Measures this machine and says which presets fit into what is free on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from leapalign import families
from leapalign.config.keys import AlignConfig
from leapalign.config.loading import load_config, preset_names
from leapalign.doctor.findings import Examination, Rates, Verdict
from leapalign.doctor.system import disk_of, gpu, host_of, lockable, no_gpu, software
from leapalign.engine.memory.available import host_available
from leapalign.engine.memory.sizes import spell_bytes
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.planner import BudgetError
from leapalign.engine.planning.rates import copy_rates, host_rates, matmul_flops_per_s
from leapalign.engine.planning.workload import Budget, Machine
from leapalign.errors import UsageError
from leapalign.families.protocol import Family
from leapalign.families.source import transformer_config
from leapalign.planning.workload import SLACK, machine_of, planner_of, refusal, run_budget, workload_of

SMALL = 1e9  # parameters: a larger model would take days on a CPU, so that no CPU is planned for it
LOCKING = 3.0  # seconds that locking of host memory is tried for

_T = TypeVar("_T")


def examine(device: torch.device, folder: Path, seconds: float) -> Examination:
    """Measure the machine and plan every preset for it.

    Args:
        device: to compute on.
        folder: where runs would be.
        seconds: of each measurement.
    """
    on_gpu = device.type == "cuda"
    card, host, disk = gpu(device) if on_gpu else None, host_of(min(seconds, 0.5)), disk_of(folder)
    notes: list[str] = []
    rates = _rates(device, seconds, notes)
    locked, lock_error = (None, "")
    if card is not None:
        card = replace(card, link=gpu(device).link)  # after the copies, when it is awake
        locked, lock_error = lockable((host.available_bytes or 0) // 2, LOCKING)
        torch.cuda.empty_cache()
    presets = tuple(verdict(name, device, rates.machine(on_gpu)) for name in preset_names())
    reason = "" if on_gpu else no_gpu()
    return Examination(
        *(str(device), card, reason, host, disk, rates, locked, lock_error, software(), tuple(notes), presets)
    )


def _rates(device: torch.device, seconds: float, notes: list[str]) -> Rates:
    def tried(what: str, measure: Callable[[], _T]) -> _T | None:
        try:
            return measure()
        except (MemoryError, RuntimeError) as error:
            notes.append(f"{what}: not measured: {str(error).strip().partition(chr(10))[0]}")
            return None

    products = tried("matrix products", lambda: matmul_flops_per_s(device, seconds=seconds))
    copies = None
    if device.type == "cuda":
        copies = tried("copies", lambda: copy_rates(device, seconds=seconds))
    return Rates(products, copies, host_rates(seconds=seconds))


# ---- presets -------------------------------------------------------------------------------------------------------


def verdict(name: str, device: torch.device, rates: dict[str, Any]) -> Verdict:
    """Plan a preset for this machine's free memory.

    Args:
        device: of this machine. A large model is not planned for a CPU: what GPU it would need is told instead.
        rates: of `Machine`, as measured.
    """
    config = load_config(name)
    found = _verdict(name, config, device, Machine(**rates))
    if trained(config):
        return found
    text = f"planned only, `leapalign align` does not train it; {found.text}"
    return replace(found, text=text, planned_only=True, checkpoint_bytes=None)


def trained(config: AlignConfig) -> bool:
    """Whether `leapalign align` trains a pipeline with such a transformer, as far as its shapes are known."""
    try:
        return isinstance(families.of_transformer(transformer_config(config)), Family)
    except UsageError:
        return True  # and the verdict says what is missing


def _verdict(name: str, config: AlignConfig, device: torch.device, machine: Machine) -> Verdict:
    on_gpu = device.type == "cuda"
    try:
        parameters = _parameters(config, machine)
        if parameters >= SMALL and not on_gpu:
            return Verdict(name, False, f"no GPU: needs one with {_needed(config, machine)}")
        plan = _planned(config, device, machine if on_gpu else machine_of(device))
    except UsageError as error:
        return Verdict(name, False, "does not fit: " + str(error).replace(" = null: ", ": ", 1))
    pictures = f"{config.train_batch_size * config.gradient_accumulation_steps} pictures of {config.resolution} pixels"
    memory = f"device {spell_bytes(plan.peak_device_bytes)}, host {spell_bytes(plan.peak_host_bytes)}"
    return Verdict(
        name,
        True,
        f"fits: {pictures} a step, {f'{plan.seconds:.1f} s; ' if on_gpu else 'on the CPU; '}{memory}",
        plan.seconds if on_gpu else None,
        plan.peak_device_bytes,
        plan.peak_host_bytes,
        checkpoint_bytes(config, parameters),
        (config.checkpoints_total_limit or 1) + 1,
    )


def _planned(config: AlignConfig, device: torch.device, machine: Machine) -> MemoryPlan:
    budget, _ = run_budget(config, device)
    free = {"vram": budget.vram, "ram": budget.ram} if device.type == "cuda" else {"ram": budget.ram}
    try:
        return planner_of(config, workload_of(config, device), machine).plan(budget)
    except BudgetError as error:
        given = {key: int(size) for key, size in free.items() if size is not None}
        raise refusal(error, config, given, device) from None


def _needed(config: AlignConfig, machine: Machine) -> str:
    """Of a GPU, and the host memory if there is too little, that the nearest plan takes."""
    there = host_available()
    ram = None if there is None else int(there * (1 - SLACK))
    larger = planner_of(config, workload_of(config), machine).shortage(Budget(vram=1, ram=ram))  # all of it is missing
    found = f"{larger['vram']} of memory"
    if "ram" in larger and ram is not None:
        found += f" and {larger['ram']} of host memory, of which {spell_bytes(ram)} are free here"
    return found


def _parameters(config: AlignConfig, machine: Machine) -> int:
    module = planner_of(config, workload_of(config), machine).costs.backbone.module
    return sum(parameter.numel() for parameter in module.parameters())


def checkpoint_bytes(config: AlignConfig, parameters: int) -> int:
    """Of one checkpoint: weights, what makes them finer, moments, and the average."""
    weights = 2 if config.weight_dtype == "bf16" else 4
    finer = {"stochastic": 0, "residual": 1, "float32": 4}[config.master]
    moments = 2 + 2 * 4 / 256 if config.optimizer == "adamw8bit" else 8
    return int(parameters * (weights + finer + moments + weights * config.use_ema))
