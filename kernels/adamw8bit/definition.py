"""AdamW with 8-bit moments, in place over a flat run of one parameter: the definition, in torch, for any device.

With the gradient g (times `scale`, the clipping factor), moments m and v, and step t from 1 (Loshchilov and Hutter,
"Decoupled weight decay regularization", 2019, Algorithm 2):

    m ← m + (1 - β1)(g - m)                     v ← β2 v + (1 - β2) g²
    w ← (1 - lr λ) w - [lr / (1 - β1^t)] m / (√v / √(1 - β2^t) + ε)

Between steps m is kept in 8 bits in bitsandbytes' signed map and √v in its unsigned one, never in code 0
(`leapalign.kernels.adamw8bit.quantize`). Not v itself: the map spans seven decades, so an element whose gradients are
3e-4 of the largest in its block has a v that is stored as 0, while its m, 3e-4 of the largest too, survives; it then
moves by lr m / ε. Measured with lognormal gradient sizes in a block, spread e^2 and e^3, over 100 steps: 3% and 10% of
the updates exceed 5 lr, the worst is 7e4 lr and more; with √v none (over 300 steps 6 in a million at e^3, the worst
6.5 lr; fp32 moments stay below 1.2 lr). The update itself uses the fp32 moments, before they are quantised again.

Weights are one of

- float32;
- bfloat16, rounded stochastically with the draws of (seed, t, parameter, element), `leapalign.kernels.rounding`;
- bfloat16 with 8 more bits each in `residual` (int8): 24-bit numbers, 16 significant bits, rounded to nearest. The bits
  of |w| are bits(|bf16|) · 2^8 + residual, so bf16 is w rounded to nearest, zero residuals are bf16 numbers as they
  are, and the sum of both is exact. An update below 2^-17 |w| is lost;
- bfloat16 with a float32 `master`, of which they are the rounding to nearest.

With q the map's values and a the blocks' largest, the arithmetic is that of `step`, with `Scalars`: what is constant
over a step is folded into the factors, which saves a third of the operations. Every operation is rounded once to fp32,
with the scalars computed in double and then rounded: the same bits on any device, for any split into runs of whole
blocks. A kernel that follows must not contract to fused multiply-adds. Torch itself needs a detour, `square_root`.
A finite gradient with |scale (1 - β1) g| above 1.8e19 overflows in its square: v is infinite from then on and its block
stands still, as in torch's AdamW the element does. Clipping to any usual norm keeps it away.

Bytes an element, bf16 weights and fp32 gradients: 2 + 4 + 2 · (1 + 4/256) read and 2 + 2 · (1 + 4/256) written, 12.06;
with a residual 2 more, with a master 6 (bf16 is then not read), with an average 4 (bf16) or 8 (fp32) more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.kernels.adamw8bit.quantize import BLOCK, blocks_of, dequantize, quantize, signed_map, unsigned_map
from leapalign.kernels.rounding import AVERAGE_STREAM, check_stream, round_stochastic

CHUNK = 1 << 20  # elements at a time: temporaries stay near 64 MiB, whatever the size of the run


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of one step.

    Attributes:
        lr: learning rate.
        beta1, beta2: decay of m and v, in [0, 1).
        eps: added to the root of v.
        weight_decay: λ, decoupled.
        step: t, from 1; corrects the bias of the moments and picks the draws of stochastic rounding.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


@dataclass(frozen=True)
class Scalars:
    """What is constant over a step, in double.

    κ = (1 - β2) / (1 - β1)² is the unit of u = v / κ, in which the gradient's part of v is the square of its part of m.

    Attributes:
        gain: (1 - β1) scale, on the gradient.
        decay_m: β1, on the largest m of a block.
        decay_root: √(β2 / κ), on the largest √v of a block.
        unit: √κ, of the root of u.
        root_gain: √κ / √(1 - β2^t) / rate, on the root of u, where rate = lr / (1 - β1^t).
        eps: ε / rate.
        decay_w: 1 - lr λ, on the weights.
    """

    gain: float
    decay_m: float
    decay_root: float
    unit: float
    root_gain: float
    eps: float
    decay_w: float


def scalars(hp: Hyper, scale: float = 1.0) -> Scalars:
    """The scalars of a step whose gradient is multiplied by `scale` first.

    A rate so small that its reciprocal, times √κ or ε, leaves float32's range, 0 among them, moves nothing.
    """
    assert hp.step >= 1, "steps are counted from 1"
    unit = math.sqrt(1 - hp.beta2) / (1 - hp.beta1)
    rate = hp.lr / (1 - hp.beta1**hp.step)
    root_gain, eps = unit / math.sqrt(1 - hp.beta2**hp.step), hp.eps
    limit = torch.finfo(torch.float32).max * abs(rate)
    moves = root_gain < limit and eps < limit
    return Scalars(
        gain=(1 - hp.beta1) * scale,
        decay_m=hp.beta1,
        decay_root=math.sqrt(hp.beta2) / unit,
        unit=unit,
        root_gain=root_gain / rate if moves else 0.0,
        eps=eps / rate if moves else math.inf,
        decay_w=1 - hp.lr * hp.weight_decay,
    )


def step(w: Tensor, g: Tensor, m: Tensor, u: Tensor, by: Scalars) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step on decayed moments, in the order of operations that is the definition: new (w, m, √u).

        h = gain g      m ← m + h      u ← u + h²      w ← decay_w w - m / (root_gain √u + eps)

    Args:
        w, g: weights and gradient, of one shape and dtype.
        m: β1 m of the step before: q (decay_m a), with a the largest of the block.
        u: β2 v / κ of the step before: q² (decay_root a)². The largest √v of a block is unit max √u.
        by: of this step.
    """
    h = g * by.gain
    m, u = m + h, u + h * h
    root = square_root(u)
    return w * by.decay_w - m / (root * by.root_gain + by.eps), m, root


def adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hp: Hyper) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step as the equations have it, in the tensors' dtype: new (w, m, v); nothing is changed in place.

    What `update` approximates, and what full-precision moments do.

    Args:
        w, g, m, v: weights, gradient and moments, of one shape, all float32 or all float64.
        hp: with step >= 1.
    """
    assert hp.step >= 1, "steps are counted from 1"
    m = m + (g - m) * (1 - hp.beta1)
    v = v * hp.beta2 + g * (1 - hp.beta2) * g
    root = square_root(v) * (1 / math.sqrt(1 - hp.beta2**hp.step))
    w = w * (1 - hp.lr * hp.weight_decay)
    return w - m * (hp.lr / (1 - hp.beta1**hp.step)) / (root + hp.eps), m, v


def square_root(x: Tensor) -> Tensor:
    """√x rounded once, in x's dtype.

    On CPUs torch takes float32 roots from MKL, which rounds 0.6% of them to the wrong neighbour. Through double they
    are right: no root of a float32 lies within 2^-50 of the middle between two, relative.
    """
    return x.double().sqrt().to(x.dtype)


@torch.no_grad()
def update(
    weights: Tensor,
    gradient: Tensor,
    codes_m: Tensor,
    absmax_m: Tensor,
    codes_v: Tensor,
    absmax_v: Tensor,
    hp: Hyper,
    *,
    seed: int,
    parameter: int,
    first: int = 0,
    residual: Tensor | None = None,
    master: Tensor | None = None,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
    scale: float = 1.0,
) -> None:
    """One step over n consecutive elements of a parameter, in place. All tensors are contiguous and on one device.

    Args:
        weights: (n,) float32 or bfloat16.
        gradient: (n,) float32 or bfloat16, finite: a non-finite one spoils its block of 256. The caller guards.
        codes_m, absmax_m: (n,) uint8 and (ceil(n / 256),) float32, m in the signed map. All zero before the first step.
        codes_v, absmax_v: the same, √v in the unsigned map.
        hp: of this step.
        seed: of the run, 0 .. 2^64 - 1.
        parameter: index of the parameter in the model, 0 .. 2^32 - 1.
        first: index of the run's first element in the parameter, a multiple of 256. Only a parameter's last run may
            have a short last block. The bits do not depend on the split.
        residual: (n,) int8, the low bits of 24-bit weights.
        master: (n,) float32 weights; `weights` are written, not read.
        ema: (n,) float32 or bfloat16, the average: ema ← ema + (1 - ema_decay)(w - ema) with the new weights as they
            are stored (master or 24-bit where there are such). bfloat16 is rounded stochastically, with its own draws.
        ema_decay: in [0, 1).
        scale: the gradient is multiplied by it first.

    Raises:
        ValueError: a wrong dtype, shape, layout, device or combination, or a coordinate of the draws out of its range.
    """
    check_run(
        *(weights, gradient, (codes_m, codes_v), (absmax_m, absmax_v), residual, master, ema),
        *(hp, seed, parameter, first),
    )
    map_m, map_v, by = signed_map(weights.device), unsigned_map(weights.device), scalars(hp, scale)
    squares = map_v.square()
    for part, blocks in _chunks(weights.numel()):
        m = dequantize(codes_m[part], absmax_m[blocks] * by.decay_m, map=map_m)
        u = dequantize(codes_v[part], (absmax_v[blocks] * by.decay_root).square_(), map=squares)
        low = None if residual is None else residual[part]
        high = None if master is None else master[part]
        w = high if high is not None else _read(weights[part], low)
        w, m, root = step(w, gradient[part].float(), m, u, by)
        quantize(m, codes_m[part], absmax_m[blocks], map=map_m)
        quantize(root, codes_v[part], absmax_v[blocks], map=map_v, nonzero=True)
        absmax_v[blocks] *= by.unit
        w = _write(w, weights[part], low, high, (seed, hp.step, parameter, first + part.start))
        if ema is not None:
            draws = (seed, hp.step, parameter, AVERAGE_STREAM + first + part.start)
            old = ema[part].float()
            _write(old + (w - old) * (1 - ema_decay), ema[part], None, None, draws)


def _read(weights: Tensor, residual: Tensor | None) -> Tensor:
    return weights.float() if residual is None else join_residual(weights, residual)


def _write(
    w: Tensor, weights: Tensor, residual: Tensor | None, master: Tensor | None, draws: tuple[int, int, int, int]
) -> Tensor:
    """Store w (n,) float32 in its format and return it as it is stored, in float32."""
    if master is not None:
        weights.copy_(master.copy_(w))
        return master
    if residual is not None:
        split_residual(w, weights, residual)
    elif weights.dtype == torch.bfloat16:
        seed, step, parameter, offset = draws
        round_stochastic(w, seed, step, parameter, offset=offset, out=weights)
    else:
        weights.copy_(w)
    return _read(weights, residual)


def split_residual(x: Tensor, weights: Tensor, residual: Tensor) -> None:
    """Round x to 24 bits, to nearest and ties to even, and write them as bfloat16 and the rest.

    Finite numbers saturate at the largest 24-bit number whose bfloat16 part is finite; inf and nan have residual 0.

    Args:
        x: any shape, float32.
        weights: bfloat16 of x's shape, written: the 24-bit number to nearest, ties away from zero.
        residual: int8 of x's shape, written: bits(|24-bit number|) - bits(|bfloat16|) · 2^8, in -128 .. 127.
    """
    bits = x.view(torch.int32)
    magnitude, infinity = bits & 0x7FFFFFFF, 0x7F800000
    # nan + 0x80 may wrap in int32; it is replaced below.
    nearest = ((magnitude + 0x7F + ((magnitude >> 8) & 1)) >> 8).clamp(max=0x7F7F7F)
    high = (nearest + 0x80) >> 8
    finite = magnitude < infinity
    residual.copy_(torch.where(finite, nearest - (high << 8), 0))
    special = (magnitude >> 16) | (magnitude > infinity).int() * 0x40  # a quiet nan
    signed = torch.where(finite, high, special) + ((bits >> 31) << 15)
    weights.copy_(signed.to(torch.int16).view(torch.bfloat16))


def join_residual(weights: Tensor, residual: Tensor) -> Tensor:
    """The 24-bit numbers that `split_residual` wrote: float32 of their shape."""
    bits = weights.view(torch.int16).int()  # sign-extended: the sign is the top bit
    magnitude = ((bits & 0x7FFF) << 8) + residual.int()
    return ((magnitude << 8) | (bits & -(2**31))).view(torch.float32)


@torch.no_grad()
def to_bitsandbytes(codes_m: Tensor, absmax_m: Tensor, codes_v: Tensor, absmax_v: Tensor) -> dict[str, Tensor]:
    """The state of bitsandbytes' AdamW8bit (blockwise, blocks of 256) for one parameter.

    m keeps its codes. bitsandbytes holds v itself in the unsigned map, so v is quantised again. A round trip changes √v
    by up to 2% where it is over 0.1 of its block's largest, 12% over 0.01, 25% over 0.001. Where it is under 4e-4, v
    becomes 3.25e-7 of the largest v (code 1, √v 5.7e-4): updates too small for some hundred steps, where code 0 would
    let bitsandbytes divide by ε alone.

    Returns:
        {"state1", "absmax1", "qmap1", "state2", "absmax2", "qmap2"}: new tensors on the same device; the states are
        flat (n,), to be viewed in the parameter's shape. `step` is the caller's to add.
    """
    map_v = unsigned_map(codes_v.device)
    state2, absmax2 = torch.empty_like(codes_v), torch.empty_like(absmax_v)
    for part, blocks in _chunks(codes_v.numel()):
        v = dequantize(codes_v[part], absmax_v[blocks], map=map_v).square_()
        quantize(v, state2[part], absmax2[blocks], map=map_v, nonzero=True)
    return {
        "state1": codes_m.clone(),
        "absmax1": absmax_m.clone(),
        "qmap1": signed_map(codes_m.device),
        "state2": state2,
        "absmax2": absmax2,
        "qmap2": map_v,
    }


@torch.no_grad()
def from_bitsandbytes(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes_m, absmax_m, codes_v, absmax_v), new and flat, of the state of one parameter in bitsandbytes' AdamW8bit.

    m keeps its codes; √v is quantised again. What bitsandbytes has stored as v = 0 is read as code 1, 3.25e-7 of the
    block's largest: its m is not 0, and must not be divided by ε alone.

    Args:
        state: with state1, absmax1, qmap1, state2, absmax2 and qmap2.

    Raises:
        ValueError: it is not in blocks of 256 or not in the dynamic maps.
    """
    for moment, own in (("1", signed_map()), ("2", unsigned_map())):
        count, peaks = state["state" + moment].numel(), state["absmax" + moment].numel()
        if peaks != blocks_of(count):
            raise ValueError(
                f"absmax{moment} has {peaks} values for {count} elements; {blocks_of(count)} make blocks of {BLOCK}: "
                "save the state with bitsandbytes' blockwise 8-bit optimizer"
            )
        # Another CPU may have rounded the map otherwise: half a unit in the last place of each intermediate.
        if not torch.allclose(state["qmap" + moment].float().cpu(), own, rtol=1e-6, atol=0):
            raise ValueError(f"qmap{moment} is not bitsandbytes' dynamic map: only its default maps can be converted")
    codes_m, absmax_m = state["state1"].flatten().clone(), state["absmax1"].flatten().clone()
    v_codes, v_absmax = state["state2"].flatten(), state["absmax2"].flatten()
    map_v = unsigned_map(v_codes.device)
    codes_v, absmax_v = torch.empty_like(v_codes), torch.empty_like(v_absmax)
    for part, blocks in _chunks(v_codes.numel()):
        root = square_root(dequantize(v_codes[part].clamp(min=1), v_absmax[blocks], map=map_v))
        quantize(root, codes_v[part], absmax_v[blocks], map=map_v, nonzero=True)
    return codes_m, absmax_m, codes_v, absmax_v


def _chunks(count: int) -> Iterator[tuple[slice, slice]]:
    """(elements, their blocks) of a run, CHUNK elements at a time."""
    for start in range(0, count, CHUNK):
        end = min(start + CHUNK, count)
        yield slice(start, end), slice(start // BLOCK, blocks_of(end))


def check_run(
    weights: Tensor,
    gradient: Tensor | None,
    codes: tuple[Tensor, Tensor],
    absmax: tuple[Tensor, Tensor],
    residual: Tensor | None,
    master: Tensor | None,
    ema: Tensor | None,
    hp: Hyper,
    seed: int,
    parameter: int,
    first: int,
    guard: Tensor | None = None,
) -> None:
    """Check a run's arguments, whoever computes it.

    Args:
        weights ... first: as `update` takes them; m's and v's together. Without a gradient there is none to check.
        guard: () float32 or float64 on the same device.

    Raises:
        ValueError: a wrong dtype, shape, layout, device or combination, or a coordinate of the draws out of its range.
    """
    count, floats = weights.numel(), (torch.float32, torch.bfloat16)
    for name, tensor, size, dtypes in (
        ("weights", weights, count, floats),
        ("gradient", gradient, count, floats),
        ("codes_m", codes[0], count, (torch.uint8,)),
        ("codes_v", codes[1], count, (torch.uint8,)),
        ("absmax_m", absmax[0], blocks_of(count), (torch.float32,)),
        ("absmax_v", absmax[1], blocks_of(count), (torch.float32,)),
        ("residual", residual, count, (torch.int8,)),
        ("master", master, count, (torch.float32,)),
        ("ema", ema, count, floats),
    ):
        if tensor is None:
            continue
        fits = tensor.shape == (size,) and tensor.device == weights.device and tensor.is_contiguous()
        if tensor.dtype not in dtypes or not fits:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; update takes contiguous "
                f"{' or '.join(map(str, dtypes))} ({size},) on {weights.device}"
            )
    if guard is not None and (
        guard.ndim or guard.dtype not in (torch.float32, torch.float64) or guard.device != weights.device
    ):
        raise ValueError(
            f"guard is {guard.dtype} {tuple(guard.shape)} on {guard.device}; "
            f"update takes float32 or float64 () on {weights.device}"
        )
    if residual is not None and master is not None:
        raise ValueError("residual and master are both given; the weights have either 24 bits or a master: pass one")
    if (residual is not None or master is not None) and weights.dtype != torch.bfloat16:
        raise ValueError(f"weights are {weights.dtype}; only bfloat16 ones have a residual or a master: pass neither")
    if first % BLOCK or first < 0:
        raise ValueError(f"first={first} is not the beginning of a block: pass a multiple of {BLOCK}")
    check_stream(seed, hp.step, parameter, first if ema is None else AVERAGE_STREAM + first, count)
