"""Sizes of memory as text, such as "24GiB"."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for kind, base in (("iB", 1024), ("B", 1000))
}
_SPELT = {unit.lower(): factor for unit, factor in _UNITS.items()}


def parse_bytes(value: str | int | float, name: str = "size") -> int:
    """Bytes of "24GiB" (2^30), "24GB" (10^9), "512 MiB", "1e9" or a number.

    Raises:
        ValueError: no such size, or none above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", str(value))
    factor = _SPELT.get(match[2].lower()) if match else None
    number = int(float(match[1]) * factor) if match and factor else 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} = {value}: give a size such as 24GiB, 64GB or a number of bytes")
    return number


def spell_bytes(count: int) -> str:
    """A size that `parse_bytes` reads, never less than `count`: rounded up to a hundredth of its unit."""
    unit = next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if count >= _UNITS[unit]), "B")
    hundredths = -(-count * 100 // _UNITS[unit])
    return f"{count}B" if unit == "B" else f"{hundredths // 100}.{hundredths % 100:02d}{unit}"
