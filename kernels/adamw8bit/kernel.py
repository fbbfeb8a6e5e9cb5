"""One step of 8-bit AdamW as a Triton kernel, bit for bit that of `leapalign.kernels.adamw8bit.definition`.

A program takes eight blocks of 256 elements: it decodes m and √v, makes the step, rounds the weights, and encodes both
moments again, all in registers. Where it reads otherwise than the definition:

- Codes. In the signed map the decades of |y| lie on straight lines in (|y|, index), each with a fifth of the slope of
  the one before, so the index is their minimum: s = min over k = 0 .. 6 of (10^6 / 0.9) 5^-k |y| + (8/9) 2^k, exact at
  the edges of the 2^k parts. In the unsigned map, with twice the parts, it is 2 s - 1. The boundaries are these edges,
  but for the last below the next decade, 0.2 parts above it, the lowest, 0.19 above 1 (0.14), and the one below the
  value 1, 0.25 parts under it. Rounded down with 0.475 taken off, s is therefore at most one code wrong, always to the
  same side, and one comparison with the boundary itself decides. The fp32 error of s, under 1e-4, has 0.2 to spare.
- Draws. Eight of them are one Philox: the words of (blocks, 32) counters are joined to (blocks, 256).
- The largest of a block is the largest of the bit patterns of |x|: those of nan are above infinity's.

fp32 products and sums are not contracted (`enable_fp_fusion=False`), the quotient and the root are IEEE's, subnormals
are kept: every operation is rounded once, as the definition says.

Bytes an element: `leapalign.kernels.adamw8bit.device`, which is the way in: the launcher checks nothing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from leapalign.kernels.adamw8bit.definition import Hyper, scalars
from leapalign.kernels.adamw8bit.quantize import BLOCK, boundaries, signed_map, unsigned_map
from leapalign.kernels.compilation import Compilation
from leapalign.kernels.dispatch import jit, tl, triton
from leapalign.kernels.rounding import AVERAGE_STREAM, DRAWS_PER_BLOCK, ROUNDS, WORD

BLOCKS = 8  # a program's tile: with 128 threads 16 elements each, so that a load of codes has 16 bytes
WARPS = 4


# ---- kernel --------------------------------------------------------------------------------------------------------


@jit
def _decode(
    codes,  # (BLOCKS, 256) u8
    peak,  # (BLOCKS, 1) fp32
    values,  # (256,) fp32, the map
):
    index = codes.to(tl.int32)
    return values.gather(index.reshape(index.numel), 0).reshape(index.shape) * peak


@jit
def _encode(
    x,  # (BLOCKS, 256) fp32
    inside,  # (BLOCKS, 256)
    floors,  # (256,) fp32: the boundary below each code
    SIGNED: tl.constexpr,
):
    """Codes, (BLOCKS, 256) int32, and absmax, (BLOCKS,) fp32. Unsigned ones are for numbers that divide."""
    peak = tl.max(tl.where(inside, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), 1)
    y = x * tl.div_rn(1.0, tl.maximum(peak, 0x00800000).to(tl.float32, bitcast=True))[:, None]
    size = tl.abs(y)
    place = tl.fma(size, 1e6 / 0.9, 8 / 9)
    for decade in tl.static_range(1, 7):
        place = tl.minimum(place, tl.fma(size, 1e6 / 0.9 / 5**decade, 8 / 9 * 2**decade))
    place = tl.where(place < 128.0, place, 128.0)  # nan has the last code
    if SIGNED:
        steps = (place - 0.475).to(tl.int32)
        index = tl.where(y < 0, 127 - steps, 128 + steps)
    else:
        index = (place * 2 - 0.475).to(tl.int32)
    floor = floors.gather(index.reshape(index.numel), 0).reshape(index.shape)
    codes = index - (floor >= y).to(tl.int32)
    if not SIGNED:
        codes = tl.maximum(codes, (peak != 0).to(tl.int32)[:, None])
    return codes, peak.to(tl.float32, bitcast=True)


@jit
def _draws(
    block,  # (BLOCKS, 1) int64: index of the first Philox block of 256 elements, a multiple of 32
    seed_low,
    seed_high,
    parameter,
    step,
    ROUNDS: tl.constexpr,
):
    """The draws of (BLOCKS, 256) elements, int32 in 0 .. 65535."""
    low = block.to(tl.uint32) | tl.arange(0, 32).to(tl.uint32)[None, :]
    high = (block >> 32).to(tl.uint32)
    a, b, c, d = tl.philox_impl(
        low,
        high,
        parameter.to(tl.uint32),
        step.to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
        n_rounds=ROUNDS,
    )
    words = tl.join(tl.join(a, c), tl.join(b, d))  # the last join counts fastest
    draws = tl.join(words & 0xFFFF, words >> 16)
    return draws.reshape(block.shape[0], 256).to(tl.int32)


@jit
def _round(
    x,  # fp32
    draws,  # int32 of its shape
):
    """`rounding.round_with_draws`: bits of a bfloat16, in int32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = tl.minimum((magnitude + draws) >> 16, 0x7F7F)
    special = (magnitude >> 16) | tl.where(magnitude > 0x7F800000, 0x40, 0)
    return tl.where(magnitude >= 0x7F800000, special, rounded) + ((bits >> 31) << 15)


@jit
def _as_bf16(bits):
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit
def _as_fp32(
    bits,  # int32: those of a bfloat16
):
    return (bits << 16).to(tl.float32, bitcast=True)


@jit
def _widened(x):
    """fp32 of fp32 or bf16: by its bits, as the interpreter's conversion does not know subnormal bf16."""
    if x.dtype == tl.bfloat16:
        x = _as_fp32(x.to(tl.int16, bitcast=True).to(tl.int32))
    return x


@jit(do_not_specialize=["terms", "first_block", "seed_low", "seed_high", "parameter", "step"])
def _update(
    weights_ptr,  # (n,) fp32 or bf16
    gradient_ptr,  # (n,) fp32 or bf16, or None: it is left and right
    left_ptr,  # (terms, rows) fp32 or bf16, or None
    right_ptr,  # (terms, cols) fp32 or bf16, or None
    codes_m_ptr,  # (n,) u8
    absmax_m_ptr,  # (ceil(n / 256),) fp32
    codes_v_ptr,  # (n,) u8
    absmax_v_ptr,  # (ceil(n / 256),) fp32
    residual_ptr,  # (n,) i8, or None
    master_ptr,  # (n,) fp32, or None
    ema_ptr,  # (n,) fp32 or bf16, or None
    guard_ptr,  # () fp64 or fp32, or None
    tables_ptr,  # (4, 256) fp32: signed map, squares of the unsigned one, the boundaries below their codes
    n,
    rows,
    cols,
    terms,
    first_block,  # of the run in its parameter
    seed_low,
    seed_high,
    parameter,
    step,
    gain,  # of `adamw8bit.Scalars`, up to the next
    decay_m,
    decay_root,
    unit,
    root_gain,
    eps,
    decay_w,
    gain_ema,  # 1 - ema_decay
    ROUNDS: tl.constexpr,  # of Philox
    AVERAGE: tl.constexpr,  # what the blocks of the average's draws are counted from
    WHOLE_ROWS: tl.constexpr,  # cols is a multiple of 256
    BLOCKS: tl.constexpr,
):
    """Program i: blocks i BLOCKS .. of the run."""
    begin = tl.program_id(0).to(tl.int64) * BLOCKS
    row = tl.arange(0, BLOCKS)[:, None]
    column = tl.arange(0, 256)[None, :]
    offset, block = row * 256 + column, begin + row
    here = tl.minimum(n - begin * 256, BLOCKS * 256).to(tl.int32)
    if guard_ptr is not None:
        here = tl.where(tl.abs(tl.load(guard_ptr)) < float("inf"), here, 0)
    inside, entry = offset < here, tl.arange(0, 256)
    index = tl.arange(0, BLOCKS)  # blocks in one dimension are loaded once, in (BLOCKS, 1) once for every element
    peaks = begin + index
    peaks_inside = index * 256 < here

    if gradient_ptr is not None:
        g = _widened(tl.load(gradient_ptr + begin * 256 + offset, mask=inside, other=0))
    else:
        g = tl.zeros((BLOCKS, 256), tl.float32)
        if WHOLE_ROWS:
            line, inside_line = peaks // (cols // 256), peaks_inside
            place = ((peaks - line * (cols // 256)) * 256).to(tl.int32)[:, None] + column
        else:
            line, inside_line = block * 256 // cols, inside
            place = (block * 256 - line * cols).to(tl.int32) + column
            line, place = line + place // cols, place % cols
        for term in range(terms):
            factor = _widened(tl.load(left_ptr + term * rows + line, mask=inside_line, other=0))
            if WHOLE_ROWS:
                factor = factor[:, None]
            g += factor * _widened(tl.load(right_ptr + term * cols + place, mask=inside, other=0))
    h = g * gain

    # All but the tables is loaded before anything is stored: no load moves up past a store.
    source_ptr = weights_ptr if master_ptr is None else master_ptr
    w = tl.load(source_ptr + begin * 256 + offset, mask=inside, other=0)
    if residual_ptr is not None:
        low = tl.load(residual_ptr + begin * 256 + offset, mask=inside, other=0).to(tl.int32)
    if ema_ptr is not None:
        ema = _widened(tl.load(ema_ptr + begin * 256 + offset, mask=inside, other=0))
    codes_m = tl.load(codes_m_ptr + begin * 256 + offset, mask=inside, other=0)
    codes_v = tl.load(codes_v_ptr + begin * 256 + offset, mask=inside, other=0)
    peak_m = tl.load(absmax_m_ptr + peaks, mask=peaks_inside, other=0)
    peak_v = tl.load(absmax_v_ptr + peaks, mask=peaks_inside, other=0)
    peak_m, peak_v = peak_m * decay_m, peak_v * decay_root
    m = _decode(codes_m, peak_m[:, None], tl.load(tables_ptr + entry)) + h
    u = _decode(codes_v, (peak_v * peak_v)[:, None], tl.load(tables_ptr + 256 + entry)) + h * h
    root = tl.sqrt_rn(u)

    if residual_ptr is not None:  # `adamw8bit.join_residual`
        bits = w.to(tl.int16, bitcast=True).to(tl.int32)
        w = (((((bits & 0x7FFF) << 8) + low) << 8) | ((bits >> 31) << 31)).to(tl.float32, bitcast=True)
    w = _widened(w)
    w = w * decay_w - tl.div_rn(m, root * root_gain + eps)

    philox_block = (first_block.to(tl.int64) + block) * 32
    if master_ptr is not None:
        tl.store(master_ptr + begin * 256 + offset, w, mask=inside)
        bits = w.to(tl.int32, bitcast=True)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # ties to even
        nearest = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, nearest)
        tl.store(weights_ptr + begin * 256 + offset, _as_bf16(nearest), mask=inside)
    elif residual_ptr is not None:  # `adamw8bit.split_residual`
        bits = w.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        nearest = tl.minimum((magnitude + (0x7F + ((magnitude >> 8) & 1))) >> 8, 0x7F7F7F)
        finite = magnitude < 0x7F800000
        special = (magnitude >> 16) | tl.where(magnitude > 0x7F800000, 0x40, 0)
        high = tl.where(finite, (nearest + 0x80) >> 8, special)
        low = tl.where(finite, nearest - (high << 8), 0)
        tl.store(residual_ptr + begin * 256 + offset, low.to(tl.int8), mask=inside)
        tl.store(weights_ptr + begin * 256 + offset, _as_bf16(high + ((bits >> 31) << 15)), mask=inside)
        w = ((((high << 8) + low) << 8) | ((bits >> 31) << 31)).to(tl.float32, bitcast=True)
    elif weights_ptr.dtype.element_ty == tl.bfloat16:
        rounded = _round(w, _draws(philox_block, seed_low, seed_high, parameter, step, ROUNDS))
        tl.store(weights_ptr + begin * 256 + offset, _as_bf16(rounded), mask=inside)
        w = _as_fp32(rounded)
    else:
        tl.store(weights_ptr + begin * 256 + offset, w, mask=inside)

    if ema_ptr is not None:
        ema = ema + (w - ema) * gain_ema
        if ema_ptr.dtype.element_ty == tl.bfloat16:
            draws = _draws(philox_block + AVERAGE, seed_low, seed_high, parameter, step, ROUNDS)
            rounded = _round(ema, draws)
            tl.store(ema_ptr + begin * 256 + offset, _as_bf16(rounded), mask=inside)
        else:
            tl.store(ema_ptr + begin * 256 + offset, ema, mask=inside)

    # Last, when the weights are stored and their registers free; the tables are in the cache by then.
    codes, peak = _encode(m, inside, tl.load(tables_ptr + 512 + entry), SIGNED=True)
    tl.store(codes_m_ptr + begin * 256 + offset, codes.to(tl.uint8), mask=inside)
    tl.store(absmax_m_ptr + peaks, peak, mask=peaks_inside)
    codes, peak = _encode(root, inside, tl.load(tables_ptr + 768 + entry), SIGNED=False)
    tl.store(codes_v_ptr + begin * 256 + offset, codes.to(tl.uint8), mask=inside)
    tl.store(absmax_v_ptr + peaks, peak * unit, mask=peaks_inside)


# ---- launcher ------------------------------------------------------------------------------------------------------


@functools.cache  # of the few devices: never called with fake tensors, which have an implementation of their own
def _tables(device: torch.device) -> Tensor:
    maps = signed_map(), unsigned_map()
    floors = [torch.nn.functional.pad(boundaries(map), (1, 0), value=-math.inf) for map in maps]
    return torch.stack([maps[0], maps[1].square(), *floors]).to(device)  # fp32, 4 KiB, kept


def _signed(word: int) -> int:
    """32 bits as an int32: Triton compiles integers above that anew, as int64."""
    return word - 2**32 if word & 2**31 else word


def launch(
    weights: Tensor,
    gradient: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    codes_m: Tensor,
    absmax_m: Tensor,
    codes_v: Tensor,
    absmax_v: Tensor,
    residual: Tensor | None,
    master: Tensor | None,
    ema: Tensor | None,
    guard: Tensor | None,
    hp: Hyper,
    seed: int,
    parameter: int,
    first: int,
    ema_decay: float,
    scale: float,
) -> None:
    """Arguments as in `adamw8bit_triton.update_triton`, all flat; the gradient or left and right; n > 0."""
    by = scalars(hp, scale)
    rows, cols, terms = (1, BLOCK, 0) if left is None or right is None else (left.shape[1], right.shape[1], len(left))
    with torch.cuda.device_of(weights):
        _update[(triton.cdiv(weights.numel(), BLOCKS * BLOCK),)](
            weights,
            gradient,
            left,
            right,
            codes_m,
            absmax_m,
            codes_v,
            absmax_v,
            residual,
            master,
            ema,
            guard,
            _tables(weights.device),
            weights.numel(),
            rows,
            cols,
            terms,
            first // BLOCK,
            _signed(seed & WORD),
            _signed(seed >> 32),
            _signed(parameter),
            _signed(hp.step),
            *(by.gain, by.decay_m, by.decay_root, by.unit, by.root_gain, by.eps, by.decay_w),
            1 - ema_decay,
            ROUNDS=ROUNDS,
            AVERAGE=AVERAGE_STREAM // DRAWS_PER_BLOCK,
            WHOLE_ROWS=cols % BLOCK == 0,
            BLOCKS=BLOCKS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


# ---- without a GPU -------------------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """Every format with fp32 and bf16 gradients and as outer products; both averages with fp32 gradients.

    The length of a run is an argument: FLUX's, SD3's and any other multiple of 16 are one binary. All have a guard,
    which is a number to load and no more.
    """
    for weights in ("fp32", "bf16", "residual", "master"):
        for gradient in ("fp32", "bf16", "outer fp32", "outer bf16", "outer fp32 ragged"):
            for average in (None, "bf16", "fp32") if gradient == "fp32" else (None,):
                yield _compilation(weights, gradient, average)


def _compilation(weights: str, gradient: str, average: str | None) -> Compilation:
    kind = gradient.removeprefix("outer ").split(" ")[0]
    outer = gradient.startswith("outer")
    pointers = {
        "weights_ptr": "fp32" if weights == "fp32" else "bf16",
        "gradient_ptr": None if outer else kind,
        "left_ptr": kind if outer else None,
        "right_ptr": kind if outer else None,
        "codes_m_ptr": "u8",
        "absmax_m_ptr": "fp32",
        "codes_v_ptr": "u8",
        "absmax_v_ptr": "fp32",
        "residual_ptr": "i8" if weights == "residual" else None,
        "master_ptr": "fp32" if weights == "master" else None,
        "ema_ptr": average,
        "guard_ptr": "fp64",
        "tables_ptr": "fp32",
    }
    integers = ("n", "rows", "cols", "terms", "first_block", "seed_low", "seed_high", "parameter", "step")
    floats = ("gain", "decay_m", "decay_root", "unit", "root_gain", "eps", "decay_w", "gain_ema")
    constants = {
        **{name: None for name, kind in pointers.items() if kind is None},
        "ROUNDS": ROUNDS,
        "AVERAGE": AVERAGE_STREAM // DRAWS_PER_BLOCK,
        "WHOLE_ROWS": not gradient.endswith("ragged"),
        "BLOCKS": BLOCKS,
    }
    if not outer:
        constants["rows"] = 1  # an argument that is 1 is compiled in
    arguments = {
        **{name: f"*{kind}" for name, kind in pointers.items()},
        **dict.fromkeys(integers, "i32"),
        **dict.fromkeys(floats, "fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    few = ("absmax_m_ptr", "absmax_v_ptr", "guard_ptr", "tables_ptr", "left_ptr")  # of blocks, and of rows
    return Compilation(
        name=f"adamw8bit.update {weights}, gradient {gradient}" + (f", average {average}" if average else ""),
        kernel=_update,
        signature=arguments,
        constants=constants,
        aligned=(*(name for name, kind in pointers.items() if kind is not None), "n", "cols"),
        num_warps=WARPS,
        fp_fusion=False,
        unstreamed=tuple(name for name in few if pointers[name] is not None),
    )
