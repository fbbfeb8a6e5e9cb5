"""What will hurt on a machine, each with the way out."""

from __future__ import annotations

import os

from leapalign.doctor.findings import Examination
from leapalign.doctor.system import Host
from leapalign.engine.memory.sizes import spell_bytes
from leapalign.kernels.dispatch import INTERPRETED
from leapalign.kernels.host import native as host_kernels

SLOW_LINK = 10e9  # bytes a second: PCIe 4.0 has 25 with 16 lanes and 6 with 4
CHECKPOINT_SECONDS = 300.0  # of writing one that is worth a warning


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
