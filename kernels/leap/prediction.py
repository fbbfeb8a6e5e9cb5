"""The two leaps of LeapAlign, their distances from the rollout and the similarity weights, in one pass.

For a sample with noise levels k > j, latents x_k, x_j, x_0 of the rollout and velocities v_k, v_j (LeapAlign, arXiv
2604.15311, eqs. 3, 4, 6 and 12):

    x^_{j|k} = x_k - (k - j) v_k                d_j = mean |x_j - x^_{j|k}|
    x^_{0|j} = x_j - j v_j                      d_0 = mean |x_0 - x^_{0|j}|
    w = 1 / (max(d_j, tau) + max(d_0, tau))

All arithmetic is float32 (float64 for float64 latents), and the distances are those of the predictions before they are
rounded to the latents' dtype. Latents and velocities may differ in dtype.

Sums are taken in two stages and without atomics: a tile of TILE elements of a sample leaves one partial sum, and a
second, small launch adds a sample's partials, always in the same order. The tiles depend on nothing but the number of
elements, so a sample's distances have the same bits whatever the batch around it. NaN and inf stay: a sample with a nan
has nan distances and weights, one with an infinite distance has the weight 0; the other samples do not notice.

Bytes an element, float32: five tensors read, 20, and with the predictions 8 written; in torch's eager operations 88.
The partials are 8 bytes in TILE elements. One leg alone (`leap_distance`): 12 read.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leapalign.kernels.compilation import Compilation
from leapalign.kernels.dispatch import jit, reaches, tl, triton

TILE = 1024  # elements of a program: two 16-byte accesses to float32 and one to bfloat16 in each of 128 threads
PARTIALS = 1024  # partial sums that the second stage reads at once


class Leaps(NamedTuple):
    """What `leap` returns.

    Attributes:
        x_jk, x_0j: (B, ...) the predictions x^_{j|k} and x^_{0|j}, in the dtype of x_k and of x_j.
        d_j, d_0, weights: (B,) distances and similarity weights, float32 (float64 for float64 latents); constants to
            autograd.
    """

    x_jk: Tensor
    x_0j: Tensor
    d_j: Tensor
    d_0: Tensor
    weights: Tensor


def leap(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_0: Tensor, k: Tensor, j: Tensor, tau: float
) -> Leaps:  # fmt: skip
    """Both predictions, their distances from the rollout and the similarity weights (eqs. 3, 4, 6, 12).

    The predictions are differentiable in latents and velocities; the weights are constants, as the paper has them.

    Args:
        x_k, v_k, x_j, v_j, x_0: (B, ...) latents of the rollout at the levels k, j and 0, and velocities at k and j.
        k, j: (B,) noise levels of each sample, k > j.
        tau: lower bound of each distance in the weight, in latent units.

    Raises:
        ValueError: tensors of different shapes, or without a batch dimension or elements.
    """
    _check((x_k, v_k, x_j, v_j, x_0), (k, j))
    x_jk, x_0j, *constants = torch.ops.leapalign.leap(x_k, v_k, x_j, v_j, x_0, k, j, tau, True)
    d_j, d_0, weights = (constant.detach() for constant in constants)
    return Leaps(x_jk, x_0j, d_j, d_0, weights)


@torch.no_grad()
def leap_distances(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_0: Tensor, k: Tensor, j: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`leap` without storing the predictions: (d_j, d_0, weights), each (B,)."""
    _check((x_k, v_k, x_j, v_j, x_0), (k, j))
    _, _, d_j, d_0, weights = torch.ops.leapalign.leap(x_k, v_k, x_j, v_j, x_0, k, j, tau, False)
    return d_j, d_0, weights


@torch.no_grad()
def leap_distance(x_k: Tensor, v_k: Tensor, x_j: Tensor, k: Tensor, j: Tensor) -> Tensor:
    """One leap's distance, mean |x_j - (x_k - (k - j) v_k)|: (B,). With j = 0 and k = j it is d_0."""
    _check((x_k, v_k, x_j), (k, j))
    distance: Tensor = torch.ops.leapalign.leap_distance(x_k, v_k, x_j, k, j)
    return distance


def similarity_weights(d_j: Tensor, d_0: Tensor, tau: float) -> Tensor:
    """(B,) w = 1 / (max(d_j, tau) + max(d_0, tau)) (eq. 12), for distances that were found one by one."""
    return 1 / (d_j.clamp(min=tau) + d_0.clamp(min=tau))


# ---- reference -----------------------------------------------------------------------------------------------------


def predict(x: Tensor, v: Tensor, width: Tensor) -> Tensor:
    """x - width v: (B, ...) in float32 or better from (B, ...), (B, ...) and (B,)."""
    return x.to(accumulated(x)) - per_sample(width, x) * v


def leap_reference(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_0: Tensor, k: Tensor, j: Tensor, tau: float
) -> Leaps:  # fmt: skip
    """`leap` in plain torch."""
    x_jk, x_0j = predict(x_k, v_k, k - j), predict(x_j, v_j, j)
    d_j, d_0 = ((real - leap).abs().flatten(1).mean(1) for real, leap in ((x_j, x_jk), (x_0, x_0j)))
    return Leaps(x_jk.to(x_k.dtype), x_0j.to(x_j.dtype), d_j, d_0, similarity_weights(d_j, d_0, tau))


def accumulated(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on x: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many dimensions as `like`, in the dtype of its arithmetic."""
    return values.to(accumulated(like)).reshape(-1, *[1] * (like.ndim - 1))


# ---- kernels -------------------------------------------------------------------------------------------------------


@jit
def leap_kernel(
    x_k_ptr: tl.tensor,  # (B, N), rows x_k_stride apart; so the next four
    v_k_ptr: tl.tensor,
    x_j_ptr: tl.tensor,
    v_j_ptr: tl.tensor,  # None: the first leg only
    x_0_ptr: tl.tensor,
    k_ptr: tl.tensor,  # (B,)
    j_ptr: tl.tensor,  # (B,)
    x_jk_ptr: tl.tensor,  # (B, N) or None: not stored
    x_0j_ptr: tl.tensor,
    partials_ptr: tl.tensor,  # (2, B, tiles): sums of |x_j - x^_{j|k}| and |x_0 - x^_{0|j}| over a tile
    x_k_stride: tl.tensor,
    v_k_stride: tl.tensor,
    x_j_stride: tl.tensor,
    v_j_stride: tl.tensor,
    x_0_stride: tl.tensor,
    num: tl.tensor,  # N
    tiles: tl.tensor,  # ceil(N / TILE)
    TILE: tl.constexpr,
) -> None:
    """A tile of one sample: both predictions, and the sums of their distances."""
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    at = program % tiles * TILE + tl.arange(0, TILE)
    inside = at < num
    j = tl.load(j_ptr + sample)
    width = tl.load(k_ptr + sample) - j
    x_k = tl.load(x_k_ptr + sample * x_k_stride + at, inside, other=0).to(tl.float32)
    v_k = tl.load(v_k_ptr + sample * v_k_stride + at, inside, other=0).to(tl.float32)
    x_j = tl.load(x_j_ptr + sample * x_j_stride + at, inside, other=0).to(tl.float32)
    x_jk = x_k - width * v_k
    tl.store(partials_ptr + program, tl.sum(tl.where(inside, tl.abs(x_j - x_jk), 0.0)))
    if x_jk_ptr is not None:
        tl.store(x_jk_ptr + sample * num + at, x_jk, inside)
    if v_j_ptr is not None:
        v_j = tl.load(v_j_ptr + sample * v_j_stride + at, inside, other=0).to(tl.float32)
        x_0 = tl.load(x_0_ptr + sample * x_0_stride + at, inside, other=0).to(tl.float32)
        x_0j = x_j - j * v_j
        second = partials_ptr + tl.num_programs(0)
        tl.store(second + program, tl.sum(tl.where(inside, tl.abs(x_0 - x_0j), 0.0)))
        if x_0j_ptr is not None:
            tl.store(x_0j_ptr + sample * num + at, x_0j, inside)


@jit
def weights_kernel(
    partials_ptr: tl.tensor,  # (2, B, tiles)
    d_j_ptr: tl.tensor,  # (B,)
    d_0_ptr: tl.tensor,  # (B,), None: the first leg only
    weights_ptr: tl.tensor,  # (B,), None as well
    num: tl.tensor,  # N
    tiles: tl.tensor,
    tau: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A sample's sums over its tiles, in order, and its similarity weight."""
    sample = tl.program_id(0).to(tl.int64)
    first = partials_ptr + sample * tiles
    second = first + tl.num_programs(0).to(tl.int64) * tiles
    d_j = 0.0
    d_0 = 0.0
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        d_j += tl.sum(tl.load(first + at, at < tiles, other=0.0))
        if d_0_ptr is not None:
            d_0 += tl.sum(tl.load(second + at, at < tiles, other=0.0))
    d_j = d_j / num
    tl.store(d_j_ptr + sample, d_j)
    if d_0_ptr is not None:
        d_0 = d_0 / num
        tl.store(d_0_ptr + sample, d_0)
        # not maximum, which may drop a nan
        w = 1.0 / (tl.where(d_j < tau, tau, d_j) + tl.where(d_0 < tau, tau, d_0))
        tl.store(weights_ptr + sample, w)


def runs_triton(*tensors: Tensor) -> bool:
    """Whether the kernels take these: float32 and bfloat16 on a GPU, or anywhere under the interpreter."""
    return reaches(tensors[0]) and all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)


def rows(x: Tensor) -> Tensor:
    """(B, N) with neighbours beside each other: a view where the samples are contiguous, at whatever distance."""
    flat = x.flatten(1)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def launch(
    legs: tuple[Tensor, ...], k: Tensor, j: Tensor, tau: float, predictions: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both stages over (x_k, v_k, x_j) or (x_k, v_k, x_j, v_j, x_0): d_j, and d_0 and the weights if there are two."""
    x_k, v_k, x_j, *more = map(rows, legs)
    (batch, num), device = x_k.shape, x_k.device
    tiles = -(-num // TILE)
    d_j, d_0, weights = (torch.empty(batch, dtype=torch.float32, device=device) for _ in range(3))
    if batch == 0:
        return d_j, d_0, weights
    partials = torch.empty(2, batch, tiles, dtype=torch.float32, device=device)  # until the second stage has read them
    k, j = (level.to(torch.float32).contiguous() for level in (k, j))
    v_j, x_0 = more or (None, None)
    strides = [0 if x is None else x.stride(0) for x in (x_k, v_k, x_j, v_j, x_0)]
    stored = predictions or (None, None)
    with torch.cuda.device_of(x_k):
        leap_kernel[(batch * tiles,)](
            x_k, v_k, x_j, v_j, x_0, k, j, *stored, partials, *strides, num, tiles, TILE=TILE, num_warps=4
        )  # fmt: skip
        weights_kernel[(batch,)](
            partials, d_j, d_0 if more else None, weights if more else None, num, tiles, tau,
            BLOCK=PARTIALS, num_warps=4,
        )  # fmt: skip
    return d_j, d_0, weights


# ---- custom ops ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("leapalign::leap", mutates_args=())
def _leap(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_0: Tensor, k: Tensor, j: Tensor, tau: float,
    predictions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x_jk, x_0j = _predictions(x_k, x_j, predictions)
    if runs_triton(x_k, v_k, x_j, v_j, x_0):
        stored = (x_jk, x_0j) if predictions else None
        return x_jk, x_0j, *launch((x_k, v_k, x_j, v_j, x_0), k, j, tau, stored)
    found = leap_reference(x_k, v_k, x_j, v_j, x_0, k, j, tau)
    return found if predictions else (x_jk, x_0j, *found[2:])


@_leap.register_fake
def _(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_0: Tensor, k: Tensor, j: Tensor, tau: float,
    predictions: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    constants = (x_k.new_empty(x_k.shape[0], dtype=accumulated(x_k)) for _ in range(3))
    return *_predictions(x_k, x_j, predictions), *constants


def _predictions(x_k: Tensor, x_j: Tensor, stored: bool) -> tuple[Tensor, Tensor]:
    """Where the predictions go; two empty tensors where they are not wanted."""
    x_jk, x_0j = (torch.empty(x.shape if stored else (0,), dtype=x.dtype, device=x.device) for x in (x_k, x_j))
    return x_jk, x_0j


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, v_k, _, v_j, _, k, j, _, ctx.stored = inputs
    ctx.dtypes = v_k.dtype, v_j.dtype
    ctx.save_for_backward(k, j)
    ctx.set_materialize_grads(False)


def _leap_backward(
    ctx: Any, g_jk: Tensor | None, g_0j: Tensor | None, *constants: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(g, -width g) to each prediction's latents and velocity: one pass each, which autograd skips where not needed."""
    k, j = ctx.saved_tensors
    dx_k, dv_k, dx_j, dv_j = None, None, None, None
    if ctx.stored and g_jk is not None:
        dx_k = g_jk
        dv_k = (per_sample(j - k, g_jk) * g_jk).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
    if ctx.stored and g_0j is not None:
        dx_j = g_0j
        dv_j = (per_sample(-j, g_0j) * g_0j).to(ctx.dtypes[1]) if ctx.needs_input_grad[3] else None
    return dx_k, dv_k, dx_j, dv_j, None, None, None, None, None


_leap.register_autograd(_leap_backward, setup_context=_save)


@torch.library.custom_op("leapalign::leap_distance", mutates_args=())
def _leap_distance(x_k: Tensor, v_k: Tensor, x_j: Tensor, k: Tensor, j: Tensor) -> Tensor:
    if runs_triton(x_k, v_k, x_j):
        return launch((x_k, v_k, x_j), k, j, 0.0, None)[0]
    return (x_j - predict(x_k, v_k, k - j)).abs().flatten(1).mean(1)


@_leap_distance.register_fake
def _(x_k: Tensor, v_k: Tensor, x_j: Tensor, k: Tensor, j: Tensor) -> Tensor:
    return x_k.new_empty(x_k.shape[0], dtype=accumulated(x_k))


def _check(tensors: tuple[Tensor, ...], levels: tuple[Tensor, ...]) -> None:
    shape, batch = tensors[0].shape, tensors[0].shape[:1]
    wrong = [tuple(x.shape) for x in tensors if x.shape != shape] + [tuple(s.shape) for s in levels if s.shape != batch]
    if wrong or len(shape) < 2 or 0 in shape[1:]:
        raise ValueError(
            f"latents of shape {tuple(shape)} with {wrong or 'no elements a sample'}: "
            "give latents and velocities of one shape (B, ...) and noise levels (B,)"
        )


# ---- what the launchers start --------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """Every kernel as FLUX and SD3.5 start it: latents are 16 or 64 channels wide, so a sample is a multiple of 16."""
    if triton is None:
        return
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    pairs = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))
    for (latents, velocities), kind in product(pairs, ("stored", "distances", "one leg")):
        x, v, fp32 = f"*{names[latents]}", f"*{names[velocities]}", "*fp32"
        signature = {"x_k_ptr": x, "v_k_ptr": v, "x_j_ptr": x, "v_j_ptr": v, "x_0_ptr": x, "k_ptr": fp32, "j_ptr": fp32}
        signature |= {"x_jk_ptr": x, "x_0j_ptr": x, "partials_ptr": fp32}
        signature |= {f"{name}_stride": "i32" for name in ("x_k", "v_k", "x_j", "v_j", "x_0")}
        aligned = (*signature, "num")
        absent = {"stored": (), "distances": ("x_jk_ptr", "x_0j_ptr")}.get(
            kind, ("v_j_ptr", "x_0_ptr", "x_jk_ptr", "x_0j_ptr")
        )
        constants = dict.fromkeys(absent) | {"TILE": TILE}
        signature |= {"num": "i32", "tiles": "i32"} | dict.fromkeys(constants, "constexpr")
        yield Compilation(
            f"leap {kind} {names[latents]}, velocities {names[velocities]}",
            leap_kernel,
            signature,
            constants,
            tuple(name for name in aligned if name not in constants),
            unstreamed=("k_ptr", "j_ptr", "partials_ptr"),
        )
    for kind, absent in (("two legs", ()), ("one leg", ("d_0_ptr", "weights_ptr"))):
        signature = {"partials_ptr": "*fp32", "d_j_ptr": "*fp32", "d_0_ptr": "*fp32", "weights_ptr": "*fp32"}
        constants = dict.fromkeys(absent) | {"BLOCK": PARTIALS}
        signature |= {"num": "i32", "tiles": "i32", "tau": "fp32"} | dict.fromkeys(constants, "constexpr")
        pointers = tuple(name for name in signature if name.endswith("_ptr") and name not in constants)
        yield Compilation(
            f"leap weights {kind}",
            weights_kernel,
            signature,
            constants,
            ("partials_ptr", "num"),
            unstreamed=pointers,  # it reads 8 bytes where the first stage has read 20 KiB
        )
