"""What `leapalign doctor` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from leapalign.engine.memory.sizes import spell_bytes

if TYPE_CHECKING:
    from leapalign.doctor.findings import Examination, Rates

UNKNOWN = "not told"
MEASURED = ("flops_per_s", "h2d_bytes_per_s", "d2h_bytes_per_s", "host_bytes_per_s")
_WIDTH = 16  # of the names


def table(found: Examination, warnings: Sequence[str]) -> str:
    """The examination as aligned text: the machine, its rates, the presets, and what will hurt."""
    names = max((len(preset.name) for preset in found.presets), default=0)
    blocks = [
        _rows(_machine(found)),
        _rows(_rates(found.rates, gpu=found.gpu is not None)),
        [f"  {note}" for note in found.notes],
        _rows([("software", _software(found.software))]),
        [f"presets, planned for {_planned_for(found)}:"] if found.presets else [],
        [f"  {each.name:{names}}  {each.text}" for each in found.presets],
        [f"warning: {line}" for line in warnings],
    ]
    return "\n".join(line for block in blocks for line in block)


def _rows(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{name:{_WIDTH}}{value}" for name, value in pairs]


def _machine(found: Examination) -> Iterator[tuple[str, str]]:
    card, host, disk = found.gpu, found.host, found.disk
    if card is None:
        yield "device", f"no GPU: {found.no_gpu}"
    else:
        link = f", {card.link}" if card.link else ""
        yield "device", f"{found.device}: {card.name}, compute capability {card.capability}{link}"
        yield "device memory", f"{_size(card.free_bytes)} free of {_size(card.total_bytes)}"
    limit = "" if host.cores_limit is None else f", control groups let it have {host.cores_limit:g}"
    yield (
        "processor",
        f"{host.cpu}: {host.usable_cores} of {host.cores} cores{limit}; {host.cores_obtained:.1f} obtained; "
        f"{host.threads} threads",
    )
    limit = "" if host.limit_bytes is None else f", limit of control groups {_size(host.limit_bytes)}"
    yield "host memory", f"{_size(host.available_bytes)} available of {_size(host.total_bytes)}{limit}"
    memlock = "unlimited" if host.memlock_bytes is None else _size(host.memlock_bytes)
    locked = "no GPU to lock for" if found.locked_bytes is None else f"{_size(found.locked_bytes)} locked at once"
    stopped = f"; then {found.lock_error}" if found.lock_error else ""
    yield "locked memory", f"{locked}; ulimit -l {memlock}{stopped}"
    written = "not measured" if disk.write_bytes_per_s is None else f"{disk.write_bytes_per_s / 1e9:.2f} GB/s written"
    yield "disk", f"{_size(disk.free_bytes)} free, {written}, in this folder"
    yield "host kernels", host.instruction_set or f"in torch: the native module is missing ({host.missing})"


def _rates(rates: Rates, *, gpu: bool) -> Iterator[tuple[str, str]]:
    where = "" if gpu else " on the CPU"
    flops = rates.matmul_flops_per_s
    yield "matrix products", "not measured" if flops is None else f"{flops / 1e12:.3g} TFLOP/s, bfloat16{where}"
    copies = rates.copies
    if copies is None:
        yield "copies", "not measured" if gpu else "not measured: no GPU"
    else:
        for name, alone, together in (
            ("host to device", copies.h2d, copies.h2d_together),
            ("device to host", copies.d2h, copies.d2h_together),
        ):
            yield name, f"{alone / 1e9:.1f} GB/s alone, {together / 1e9:.1f} both ways at once"
    yield "host copy", f"{rates.host.copy / 1e9:.1f} GB/s, read and written"
    yield "host update", f"{rates.host.in_place / 1e9:.1f} GB/s in place, 14 bytes a parameter"


def _software(versions: dict[str, str | None]) -> str:
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = ", ".join(name for name, version in versions.items() if not version)
    return there + (f"; without {missing}" if missing else "")


def _planned_for(found: Examination) -> str:
    if found.gpu is None:
        return "the memory that is free; for a CPU no seconds are predicted"
    default = [name for name in MEASURED if name not in found.machine]
    return "the memory that is free and these rates" + (f", by default {', '.join(default)}" if default else "")


def _size(count: int | None) -> str:
    return UNKNOWN if count is None else spell_bytes(count)
