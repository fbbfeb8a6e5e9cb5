"""8-bit numbers in blocks of 256 with one fp32 absmax each, in bitsandbytes' dynamic maps: the definition, in torch.

    absmax_b = max |x_i| over block b,      y_i = x_i · (1 / max(absmax_b, 2^-126)),
    code_i   = the index of the map's value nearest to y_i, the lower one at equal distance,
    x'_i     = map[code_i] · absmax_b.

Every operation is rounded once, to fp32, so that any device and language gives the same bits (without contraction to
fused multiply-add). "Nearest" is exact: `boundaries` gives the 255 floats between which the codes change.

A map holds 0, 1 and seven decades from 1e-7 to 1, the higher the finer: of decade k = 0 .. 6, [0.1, 1] · 10^(k-6), the
midpoints of 2^k equal parts with both signs (signed), or of 2^(k+1) parts (unsigned). So -1 is no value of the signed
map, the lowest is -0.993; and what is under 2.75e-7 (signed) or 1.6e-7 (unsigned) of the block's largest becomes 0.

Special blocks:

- zero: absmax 0, codes of the value 0. All bytes zero also stand for zeros, so zero-filled memory is a valid state;
- absmax below 2^-126 (1.2e-38): decoded to less than was encoded; the error is below 2^-126;
- with an inf or nan: decodes to inf or nan in every element, never to a number that could be taken for one.
  The other blocks are not touched. The caller guards.

bitsandbytes' codes are the same where it searches the map: in torch (for float64 input on the CPU, and where it has no
kernel) and on the GPU, up to values exactly between two codes and to zero and subnormal blocks, in which its backends
differ from each other. Its fast CPU kernel (0.50) looks y up in a table with steps of about 3e-5 and does not find the
nearest code for small y: 0 becomes 2e-5 of the block's largest.

Bytes an element: quantize reads 4 and writes 1 + 4/256; dequantize reads 1 + 4/256 and writes 4.

Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015 (the map); Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", 2021 (blocks); bitsandbytes.functional.create_dynamic_map, quantize_blockwise.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 256
SMALLEST_NORMAL = 2.0**-126  # its reciprocal is finite, also where subnormals are flushed


def signed_map(device: torch.device | str = "cpu") -> Tensor:
    """(256,) float32, ascending from -0.993 to 1; index 127 is 0."""
    return torch.tensor(_dynamic_map(signed=True), dtype=torch.float32).to(device)


def unsigned_map(device: torch.device | str = "cpu") -> Tensor:
    """(256,) float32, ascending from 0 to 1."""
    return torch.tensor(_dynamic_map(signed=False), dtype=torch.float32).to(device)


@functools.cache
def _dynamic_map(*, signed: bool) -> tuple[float, ...]:
    """The map's 256 values, float32 numbers.

    The edges of the parts are those of torch.linspace(0.1, 1, n + 1): counted from the nearer end, each rounded once.
    In Python, because linspace itself gives other bits on a CPU without fused multiply-add, and no tensor is cached,
    because one made under FakeTensorMode must not be found outside it.
    """
    low, high = _float32(0.1), 1.0
    magnitudes = []
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        step = _float32(_float32(high - low) / parts)
        edges = [
            _float32(low + k * step) if k < (parts + 1) // 2 else _float32(high - (parts - k) * step)
            for k in range(parts + 1)
        ]
        power = _float32(10.0 ** (decade - 6))
        magnitudes += [_float32(power * _float32(_float32(a + b) / 2)) for a, b in itertools.pairwise(edges)]
    negative = [-value for value in magnitudes] if signed else []
    values = sorted([*negative, 0.0, *magnitudes, 1.0])
    assert len(values) == 256, "a map has a value for every code"
    return tuple(values)


def _float32(value: float) -> float:
    """The float32 nearest to a double."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def boundaries(map: Tensor) -> Tensor:
    """(255,) float32: y has the code that is the number of boundaries below y (strictly).

    Each is the largest float32 not above the exact midpoint of two neighbours, so that comparing with it decides as
    comparing the exact distances does.
    """
    middle = (map[:-1].double() + map[1:].double()) / 2  # exact
    rounded = middle.float()
    return torch.where(rounded.double() > middle, torch.nextafter(rounded, rounded - 1), rounded)


@torch.no_grad()
def quantize(x: Tensor, codes: Tensor, absmax: Tensor, *, map: Tensor, nonzero: bool = False) -> None:
    """Encode x into codes and absmax, in place.

    Args:
        x: (n,) float32, contiguous; the last block may be short.
        codes: (n,) uint8, written.
        absmax: (ceil(n / 256),) float32, written.
        map: (256,) float32, ascending, on x's device.
        nonzero: for the unsigned map and sqrt(v): code 0 is not emitted in a block whose absmax is not 0; code 1,
            3.25e-7 of the largest, takes its place. It is for a number that divides: a zero would leave eps alone.

    Raises:
        ValueError: a wrong dtype, shape, layout or device.
    """
    _check(codes, absmax, map)
    if x.dtype != torch.float32 or x.shape != codes.shape or x.device != codes.device or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}; quantize reads contiguous float32 {tuple(codes.shape)} "
            f"on {codes.device}, as many as there are codes"
        )
    edges = boundaries(map)
    for values, targets, peaks in zip(_rows(x), _rows(codes), _columns(absmax, x.numel()), strict=True):
        peaks.copy_(values.abs().amax(dim=1, keepdim=True))
        found = torch.bucketize(values * peaks.clamp(min=SMALLEST_NORMAL).reciprocal(), edges, out_int32=True)
        if nonzero:
            found = torch.maximum(found, (peaks != 0).to(found.dtype))
        targets.copy_(found)


@torch.no_grad()
def dequantize(codes: Tensor, absmax: Tensor, *, map: Tensor) -> Tensor:
    """Decode: (n,) float32.

    Args:
        codes: (n,) uint8, contiguous.
        absmax: (ceil(n / 256),) float32, contiguous.
        map: (256,) float32 on their device.

    Raises:
        ValueError: a wrong dtype, shape, layout or device.
    """
    _check(codes, absmax, map)
    x = map.index_select(0, codes.int())
    for values, peaks in zip(_rows(x), _columns(absmax, x.numel()), strict=True):
        values.mul_(peaks)
    return x


def blocks_of(count: int) -> int:
    """Number of blocks, and of absmax values, of so many elements."""
    return -(-count // BLOCK)


def _rows(flat: Tensor) -> Iterator[Tensor]:
    """Views of (n,): the whole blocks, (n // 256, 256), and then, if there is one, the short one, (1, n % 256)."""
    whole = flat.numel() - flat.numel() % BLOCK
    yield flat[:whole].view(-1, BLOCK)
    if whole < flat.numel():
        yield flat[whole:].view(1, -1)


def _columns(absmax: Tensor, count: int) -> Iterator[Tensor]:
    """The absmax of `_rows` of `count` elements: (rows, 1)."""
    yield absmax[: count // BLOCK, None]
    if count % BLOCK:
        yield absmax[count // BLOCK :, None]


def _check(codes: Tensor, absmax: Tensor, map: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.ndim != 1 or not codes.is_contiguous():
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}; they are contiguous uint8 (n,): pass a flat view"
        )
    blocks = blocks_of(codes.numel())
    if absmax.dtype != torch.float32 or absmax.shape != (blocks,) or absmax.device != codes.device:
        raise ValueError(
            f"absmax is {absmax.dtype} {tuple(absmax.shape)} on {absmax.device}; {codes.numel()} codes on "
            f"{codes.device} have float32 ({blocks},) there, one for every {BLOCK}"
        )
    if map.dtype != torch.float32 or map.shape != (256,) or map.device != codes.device:
        raise ValueError(
            f"map is {map.dtype} {tuple(map.shape)} on {map.device}; codes on {codes.device} index float32 (256,) there"
        )
