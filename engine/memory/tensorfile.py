"""safetensors files read into memory that is already there, and written from it.

`safetensors.safe_open` maps the file, and pages of a mapping count as the process's own: loading 24 GB of weights that
way peaks at twice their size. Here the file's bytes go straight to where they belong, and where the dtype differs or
the target is not on the host, through a buffer of 64 MiB.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length n; n bytes of JSON,
{name: {dtype, shape, data_offsets: [first, end]}, "__metadata__": {str: str}}; the data, without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

STAGING_BYTES = 2**26  # a transfer that cannot be direct goes through this much of host memory
MAX_HEADER_BYTES = 10**8  # what safetensors itself accepts

_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its bytes are start .. start + nbytes from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a file holds, in the order of its data."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The names, dtypes, shapes and places of a file's tensors.

    Raises:
        ValueError: the file is no safetensors file, is cut short, or has a dtype that torch lacks.
    """
    with _open(path) as file:
        return _header(file, path)


def check(path: Path, targets: Mapping[str, Tensor]) -> set[str]:
    """The names in a file, all of which are among the targets with the same shape.

    Raises:
        ValueError: a name or a shape that is unknown or different, or as `read_header`.
    """
    tensors = read_header(path).tensors
    for name, entry in tensors.items():
        target = targets.get(name)
        if target is None or target.shape != entry.shape:
            have = "is not in this model" if target is None else f"is {tuple(target.shape)} in this model"
            raise ValueError(f"{path} holds {name} {entry.shape}, which {have}; it belongs to another model")
    return set(tensors)


@torch.no_grad()
def read_into(path: Path, targets: Mapping[str, Tensor]) -> set[str]:
    """Copy every tensor of a file into the target of its name, in place, cast to the target's dtype and device.

    Returns:
        The names read.

    Raises:
        ValueError: as `check`, and nothing has been written; or the file became shorter meanwhile.
    """
    check(path, targets)
    staging = torch.empty(0, dtype=torch.uint8)
    with _open(path) as file:
        entries = _header(file, path).tensors
        for name, entry in entries.items():
            target = targets[name].detach()
            file.seek(entry.start)
            if entry.nbytes == 0:
                continue
            if target.dtype == entry.dtype and target.device.type == "cpu" and target.is_contiguous():
                _fill(file, target, path)
                torch.autograd.graph.increment_version(target)  # no graph may use it as if it were unchanged
                continue
            # Flat chunks; a target that has no flat view takes its tensor whole.
            flat = target.view(-1) if target.is_contiguous() else None
            step = math.prod(entry.shape) if flat is None else STAGING_BYTES // entry.dtype.itemsize
            if staging.numel() < (need := min(entry.nbytes, step * entry.dtype.itemsize)):
                staging = torch.empty(need, dtype=torch.uint8)
            for first in range(0, math.prod(entry.shape), step):
                count = min(step, math.prod(entry.shape) - first)
                chunk = staging[: count * entry.dtype.itemsize].view(entry.dtype)
                _fill(file, chunk, path)
                if flat is None:
                    target.copy_(chunk.view(entry.shape))
                else:
                    flat[first : first + count].copy_(chunk)
    return set(entries)


@torch.no_grad()
def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file; a contiguous tensor on the host is written from where it is, without a copy.

    Args:
        metadata: {"format": "pt"} if None: transformers and diffusers want it.

    Raises:
        ValueError: a dtype that the format lacks.
    """
    assert "__metadata__" not in tensors, "the format keeps this name for itself"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    # The widest first, so that every tensor is aligned to its own width.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors files cannot hold; cast it first")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            flat = tensor.detach().contiguous().view(-1)
            step = STAGING_BYTES // flat.dtype.itemsize
            for first in range(0, flat.numel(), step):
                file.write(_bytes(flat[first : first + step].cpu()))


def _open(path: Path) -> FileIO:
    return open(path, "rb", buffering=0)  # unbuffered: the system writes into the target itself


def _header(file: FileIO, path: Path) -> Header:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > MAX_HEADER_BYTES:
        raise ValueError(f"{path} is no safetensors file ({size} bytes, header of {length}); copy or download it again")
    if size < 8 + length:
        raise ValueError(f"{path} is cut short: {size} bytes, its header alone has {length}; copy or download it again")
    try:
        parsed = json.loads(_read(file, length))
        if not isinstance(parsed, dict):
            raise ValueError("no JSON object")
        metadata = dict(parsed.pop("__metadata__", None) or {})
        found = {name: _entry(name, fields, 8 + length) for name, fields in parsed.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a broken header ({_one_line(error)}); copy or download it again") from None
    entries = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    end = 8 + length
    for name, entry in entries.items():
        if entry.start != end:
            raise ValueError(
                f"{path} has a broken header ({name} starts at byte {entry.start}, what is before it ends at {end}); "
                "copy or download it again"
            )
        end += entry.nbytes
    if size != end:
        state = "is cut short" if size < end else "has bytes that belong to no tensor"
        raise ValueError(f"{path} {state}: {size} bytes, its header says {end}; copy or download it again")
    return Header(MappingProxyType(entries), MappingProxyType(metadata))


def _entry(name: str, fields: Mapping[str, Any], data: int) -> Entry:
    if fields["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is of the unknown dtype {fields['dtype']}")
    shape, (first, end) = tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, end)):
        raise ValueError(f"{name} has shape {shape} at bytes {first} to {end}")
    entry = Entry(_DTYPES[fields["dtype"]], shape, data + first)
    if entry.nbytes != end - first:
        raise ValueError(f"{name} of shape {shape} takes {entry.nbytes} bytes, not {end - first}")
    return entry


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _fill(file: FileIO, target: Tensor, path: Path) -> None:
    """Read from the file's place on until the contiguous host tensor is full."""
    memory = _bytes(target)
    done = 0
    while done < len(memory):  # one call reads at most 2 GiB
        count = file.readinto(memory[done:])
        if not count:
            raise ValueError(f"{path} became shorter while it was read; copy or download it again")
        done += count


def _read(file: FileIO, length: int) -> bytes:
    content = bytearray()
    while len(content) < length and (more := file.read(length - len(content))):
        content += more
    return bytes(content)
