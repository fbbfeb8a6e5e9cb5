"""`leapalign doctor`: measures this machine, says which presets fit, and warns of what will hurt."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from leapalign import __version__
from leapalign.config.keys import AlignConfig
from leapalign.config.loading import load_config, preset_names
from leapalign.doctor.report import table
from leapalign.doctor.system import Disk, Gpu, Host, disk_of, gpu, host_of, lockable, no_gpu, software
from leapalign.engine.memory.available import host_available
from leapalign.engine.memory.sizes import spell_bytes
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.planner import BudgetError
from leapalign.engine.planning.rates import CopyRates, HostRates, copy_rates, host_rates, matmul_flops_per_s
from leapalign.engine.planning.workload import Budget, Machine
from leapalign.errors import UsageError
from leapalign.families.pipeline import resolve_device
from leapalign.families.published import transformer_config
from leapalign.kernels.dispatch import INTERPRETED
from leapalign.kernels.host import native as host_kernels
from leapalign.planning.workload import SLACK, machine_of, planner_of, refusal, run_budget, workload_of

FLUX = "FluxTransformer2DModel"
SMALL = 1e9  # parameters: a larger model would take days on a CPU, so that no CPU is planned for it
SLOW_LINK = 10e9  # bytes a second: PCIe 4.0 has 25 with 16 lanes and 6 with 4
LOCKING = 3.0  # seconds that locking of host memory is tried for
CHECKPOINT_SECONDS = 300.0  # of writing one that is worth a warning

_T = TypeVar("_T")


@dataclass(frozen=True)
class Verdict:
    """Whether a preset fits into what is free on this machine.

    Attributes:
        text: "fits" and what it would take, or what is missing.
        seconds: predicted for a step; None where it does not fit, and on a CPU.
        device_bytes, host_bytes: predicted peaks; None where it does not fit.
        checkpoint_bytes: of one checkpoint; None where it does not fit, or no run writes any.
        checkpoints: that a run keeps, and the one being written.
        planned_only: `leapalign align` does not train it, whether it fits or not.
    """

    name: str
    fits: bool
    text: str
    seconds: float | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    checkpoint_bytes: int | None = None
    checkpoints: int = 2
    planned_only: bool = False


@dataclass(frozen=True)
class Rates:
    """What was measured; None: it was not, `notes` of the examination say why.

    Attributes:
        matmul_flops_per_s: bfloat16 products, on the GPU or, without one, on the CPU.
        copies: between host and GPU.
        host: of the host kernels' threads.
    """

    matmul_flops_per_s: float | None
    copies: CopyRates | None
    host: HostRates

    def machine(self, gpu: bool) -> dict[str, Any]:
        """Those of `Machine`'s rates that are known: without a GPU those of the host alone."""
        found: dict[str, Any] = {"host_bytes_per_s": self.host.in_place}
        if gpu and self.matmul_flops_per_s is not None:
            found["flops_per_s"] = self.matmul_flops_per_s
        if gpu and self.copies is not None:  # a step copies both ways at once
            found["h2d_bytes_per_s"] = self.copies.h2d_together
            found["d2h_bytes_per_s"] = self.copies.d2h_together
        return found


@dataclass(frozen=True)
class Examination:
    """All that was found.

    Attributes:
        gpu: None without one, `no_gpu` says why.
        locked_bytes: of host memory that CUDA locked at once; None without a GPU.
        lock_error: what stopped it there, if anything.
        notes: what could not be measured, and why.
    """

    device: str
    gpu: Gpu | None
    no_gpu: str
    host: Host
    disk: Disk
    rates: Rates
    locked_bytes: int | None
    lock_error: str
    software: dict[str, str | None]
    notes: tuple[str, ...] = ()
    presets: tuple[Verdict, ...] = ()

    @property
    def machine(self) -> dict[str, Any]:
        """For `leapalign plan --machine`: the rates that were measured, and no others."""
        return self.rates.machine(self.gpu is not None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"leapalign": __version__, "machine": self.machine, **asdict(self), "warnings": warnings(self)}


def doctor_command(seconds: float) -> dict[str, Any]:
    """What `leapalign doctor --json` prints, and its "table".

    Args:
        seconds: of each measurement: products, copies, host, cores.
    """
    found = examine(resolve_device("auto"), Path.cwd(), seconds)
    head = {"date": datetime.now(UTC).date().isoformat(), "command": f"leapalign doctor --seconds {seconds:g}"}
    return {**head, **found.as_dict(), "table": table(found, warnings(found))}


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
        return transformer_config(config).get("_class_name", FLUX) == FLUX
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


# ---- warnings ------------------------------------------------------------------------------------------------------


def warnings(found: Examination) -> list[str]:
    """What will hurt on this machine, each with the way out."""
    return [*_of_software(found), *_of_cores(found.host), *_of_memory(found), *_of_link(found), *_of_disk(found)]


def _of_software(found: Examination) -> list[str]:
    lines = []
    if found.host.instruction_set is None:
        lines.append(
            f"the native module is missing ({found.host.missing}): updates on the host are several times slower; "
            "reinstall leapalign with a C++ compiler"
        )
    elif found.host.instruction_set != (best := host_kernels.instruction_sets()[-1]):
        lines.append(f"host kernels use {found.host.instruction_set}, {best} is there; unset LEAPALIGN_ISA")
    if INTERPRETED:
        lines.append("TRITON_INTERPRET = 1: Triton kernels are interpreted, thousands of times slower; unset it")
    if found.gpu is None:
        return lines
    if found.software["triton"] is None:
        lines.append("Triton is not installed: kernels run in plain torch; pip install triton")
    if float(found.gpu.capability) < 8:
        lines.append(
            f"{found.gpu.name} has compute capability {found.gpu.capability}: no bfloat16 tensor cores; use a card of "
            "8.0 or more"
        )
    return lines


def _of_cores(host: Host) -> list[str]:
    lines = []
    most = min(float(host.usable_cores), host.cores_limit or host.usable_cores)
    if host.threads > most:
        lines.append(
            f"{host.threads} threads share {most:g} cores; set OMP_NUM_THREADS={max(int(most), 1)}, or host_threads"
        )
    elif 2 * host.threads < host.usable_cores // 2:  # two hardware threads a core, and torch counts cores
        reason = f" (OMP_NUM_THREADS={set_to})" if (set_to := os.environ.get("OMP_NUM_THREADS")) else ""
        lines.append(f"torch has {host.threads} threads of {host.usable_cores} cores{reason}; set OMP_NUM_THREADS")
    if host.cores_obtained < 0.7 * most:
        lines.append(
            f"{host.cores_obtained:.1f} of {most:g} cores were obtained: the rates here are too low for an idle "
            "machine; end other programs and measure again"
        )
    return lines


def _of_memory(found: Examination) -> list[str]:
    lines = []
    host, card = found.host, found.gpu
    most = min((size for size in (host.total_bytes, host.limit_bytes) if size is not None), default=None)
    if most is not None and host.available_bytes is not None and host.available_bytes < 0.7 * most:
        lines.append(
            f"{spell_bytes(host.available_bytes)} of {spell_bytes(most)} of host memory are available; end other "
            "programs before a run"
        )
    if card is not None and card.free_bytes < 0.9 * card.total_bytes:
        lines.append(
            f"{spell_bytes(card.free_bytes)} of {spell_bytes(card.total_bytes)} of device memory are free; end other "
            "programs on the GPU (nvidia-smi lists them)"
        )
    if found.lock_error:
        limit = "unlimited" if host.memlock_bytes is None else spell_bytes(host.memlock_bytes)
        lines.append(
            f"no more than {spell_bytes(found.locked_bytes or 0)} of host memory could be locked (ulimit -l: {limit}): "
            "weights and states that stream must be; raise the limit, or free host memory"
        )
    return lines


def _of_link(found: Examination) -> list[str]:
    copies = found.rates.copies
    if copies is None or (slowest := min(copies.h2d_together, copies.d2h_together)) >= SLOW_LINK:
        return []
    link = f" ({found.gpu.link})" if found.gpu and found.gpu.link else ""
    return [
        f"copies between host and GPU reach {slowest / 1e9:.1f} GB/s both ways at once{link}: streamed blocks will "
        "wait; use a slot with 16 lanes, or a larger train_batch_size, which shares one copy"
    ]


def _of_disk(found: Examination) -> list[str]:
    disk, lines = found.disk, []
    rate = disk.write_bytes_per_s
    if rate is None:
        return [f"nothing can be written to this folder ({disk.reason}); give runs another output_dir"]
    for preset in found.presets:
        size = preset.checkpoint_bytes
        if size is None:
            continue
        if size * preset.checkpoints > disk.free_bytes:
            lines.append(
                f"{preset.name}: {preset.checkpoints} checkpoints take {spell_bytes(size * preset.checkpoints)}, the "
                f"disk has {spell_bytes(disk.free_bytes)} free; give another output_dir or a lower "
                "checkpoints_total_limit"
            )
        if size / rate > CHECKPOINT_SECONDS:
            lines.append(
                f"{preset.name}: a checkpoint of {spell_bytes(size)} takes {size / rate / 60:.0f} minutes at "
                f"{rate / 1e6:.0f} MB/s; give an output_dir on a faster disk, or checkpointing_steps a higher number"
            )
    return lines
