"""The backward of `qk_norm_rope`: one pass over dq', dk', q and k, and a small one over partial sums.

In its names, with the gradient dy of a head and R^T = -R:

    dz = dy c - R(dy s),    dw = Σ over batch, tokens and heads of dz n,    dx = r (dz w - n mean(dz w n))

and without a weight dx = dz. The statistic r is computed again. dw is summed in two stages without atomics: a program
leaves its sum over HEADS heads of `group` tokens, and a second launch adds these, in order. The partition depends on
nothing but the shapes, and so do the bits; what is not finite in one head spoils its own dx, and dw.

Bytes a token, H heads, bf16: 6 · 2HD, 8D for cos and sin, and 16D ceil(H/8) / group for partial sums written and read:
38.1 to 38.7 kB in FLUX (H = 24, D = 128). Where the weights' gradients are not wanted there are no partial sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from leapalign.kernels.blocks.heads import (
    accumulated,
    addressed,
    contiguous,
    empty,
    inverse_rms,
    rotate,
    rows,
    runs_triton,
    tiling,
)
from leapalign.kernels.compilation import Compilation

try:
    import triton
    import triton.language as tl

    from leapalign.kernels.blocks.heads import optional, tile_inverse_rms, tile_rotate
except ImportError:  # no Triton for this platform: the reference everywhere
    triton = None

# Numbers that a program of the second stage reads at once, 16 bytes eight times in each of 256 threads. Few columns,
# that is many programs: there are only 2 D sums, of some thousand partial ones each.
ROWS, COLUMNS = 1024, 8


# ---- reference -----------------------------------------------------------------------------------------------------


def backward_reference(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, first: int
) -> tuple[Tensor, Tensor | None]:
    """(dx, dw) of one side, before they are rounded; dw is None where there is no weight."""
    dz = dy.to(accumulated(dy))
    if cos is not None and sin is not None:
        dz = dz * rows(cos, dy, first) - rotate(dz * rows(sin, dy, first))
    if x is None or weight is None:
        return dz, None
    x = x.to(accumulated(x))
    r = inverse_rms(x, eps)
    n, dn = x * r, dz * weight
    return r * (dn - n * (dn * n).mean(-1, keepdim=True)), (dz * n).sum((0, 1, 2))


# ---- kernels -------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def backward_side(  # type: ignore[no-untyped-def]
        dy_ptr, x_ptr, weight, cos, sin, dx_ptr, dw, dy_at, at, dx_at, inside, eps,
        DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        d = tl.load(dy_ptr + dy_at, inside, other=0).to(tl.float32)
        if cos is not None:
            d = d * cos - tile_rotate(d * sin, HEADS, WIDTH)
        if weight is not None:
            x = tl.load(x_ptr + at, inside, other=0).to(tl.float32)
            r = tile_inverse_rms(x, eps, DIM)
            n = x * r
            dw += tl.where(inside, d * n, 0.0)  # where there is no head, r is infinite for eps = 0
            d *= weight
            d = r * (d - n * (tl.sum(d * n, 1, keep_dims=True) / DIM))
        tl.store(dx_ptr + dx_at, d, inside)
        return dw

    @triton.jit(do_not_specialize=["tokens", "length", "first", "group"])  # one binary for every size
    def backward_kernel(  # type: ignore[no-untyped-def]
        dy_q_ptr,  # (B, T, ALL_HEADS, DIM) with the strides dy_*; so dy_k
        dy_k_ptr,
        q_ptr,  # (B, T, ALL_HEADS, DIM) with the strides below, or None where there is no weight; so k
        k_ptr,
        weight_q_ptr,  # (DIM,) or None; so weight_k
        weight_k_ptr,
        cos_ptr,  # (rows, DIM) or None; so sin
        sin_ptr,
        dq_ptr,  # (B, T, ALL_HEADS, DIM), contiguous; so dk
        dk_ptr,
        partials_ptr,  # (2, programs, DIM) float32: dw of q and k over a program's heads, or None: not wanted
        dy_batch_stride,
        dy_token_stride,
        dy_head_stride,
        batch_stride,
        token_stride,
        head_stride,
        tokens,  # B T
        length,  # T
        first,
        group,  # tokens of a program
        eps,
        ALL_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        HEADS: tl.constexpr,
        WIDTH: tl.constexpr,  # DIM, or the next power of two
    ):
        tiles: tl.constexpr = (ALL_HEADS + HEADS - 1) // HEADS
        program = tl.program_id(0)
        head = program % tiles * HEADS + tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, WIDTH)[None, :]
        inside = (head < ALL_HEADS) & (column < DIM)
        shared = tl.broadcast_to(column, (HEADS, WIDTH))
        weight_q = optional(weight_q_ptr, shared, inside)
        weight_k = optional(weight_k_ptr, shared, inside)
        dw_q = tl.zeros((HEADS, WIDTH), tl.float32)
        dw_k = tl.zeros((HEADS, WIDTH), tl.float32)
        start = program // tiles * group
        for step in range(tl.minimum(group, tokens - start)):
            token = start + step
            batch = (token // length).to(tl.int64)
            row = token % length
            dy_at = batch * dy_batch_stride + row.to(tl.int64) * dy_token_stride + head * dy_head_stride + column
            at = batch * batch_stride + row.to(tl.int64) * token_stride + head * head_stride + column
            dx_at = token.to(tl.int64) * ALL_HEADS * DIM + head * DIM + column
            cos = optional(cos_ptr, (first + row) * DIM + shared, inside)
            sin = optional(sin_ptr, (first + row) * DIM + shared, inside)
            dw_q = backward_side(
                dy_q_ptr, q_ptr, weight_q, cos, sin, dq_ptr, dw_q, dy_at, at, dx_at, inside, eps, DIM, HEADS, WIDTH
            )
            dw_k = backward_side(
                dy_k_ptr, k_ptr, weight_k, cos, sin, dk_ptr, dw_k, dy_at, at, dx_at, inside, eps, DIM, HEADS, WIDTH
            )
        if partials_ptr is not None:
            numbers = tl.arange(0, WIDTH)
            partial = partials_ptr + program * DIM + numbers
            tl.store(partial, tl.sum(dw_q, 0), numbers < DIM)
            tl.store(partial + tl.num_programs(0) * DIM, tl.sum(dw_k, 0), numbers < DIM)

    @triton.jit(do_not_specialize=["programs"])
    def weights_kernel(  # type: ignore[no-untyped-def]
        partials_ptr,  # (2, programs, DIM)
        dw_q_ptr,  # (DIM,) or None; so dw_k
        dw_k_ptr,
        programs,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        side = tl.program_id(1)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.arange(0, ROWS)[:, None]
        partials_ptr += side.to(tl.int64) * programs * DIM
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, programs, ROWS):
            inside = (start + row < programs) & (column < DIM)[None, :]
            total += tl.sum(tl.load(partials_ptr + (start + row) * DIM + column[None, :], inside, other=0), 0)
        if dw_q_ptr is not None:
            tl.store(dw_q_ptr + column, total, (column < DIM) & (side == 0))
        if dw_k_ptr is not None:
            tl.store(dw_k_ptr + column, total, (column < DIM) & (side == 1))


def _warps(of_bf16: int, itemsize: int) -> int:
    """float32 in twice as many threads, 16 bytes each: with 32 the B200's compiler spills."""
    return min(32, of_bf16 * itemsize // 2)


def launch(
    dy_q: Tensor, dy_k: Tensor, q: Tensor | None, k: Tensor | None, weights: tuple[Tensor | None, ...],
    tables: tuple[Tensor | None, ...], eps: float, first: int, dw: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq and dk; the weights' gradients are written into dw, where there is a tensor."""
    dq, dk = empty(dy_q), empty(dy_k)
    batch, length, heads, dim = dy_q.shape
    constants, warps, tiles = tiling(heads, dim)
    group = min(32, max(8, batch * length * tiles // 4096))  # programs enough for any GPU, and partial sums few enough
    programs = -(-batch * length // group) * tiles
    partials = None
    if any(grad is not None for grad in dw):
        # float32, until the second stage has read them; 7 MiB for a batch of 8 at 1024 x 1024 in FLUX
        partials = torch.empty(2, programs, dim, dtype=torch.float32, device=dy_q.device)
    dy_q_at, dy_k_at, dy_strides = addressed(dy_q, dy_k)
    q, k, strides = addressed(q, k)
    with torch.cuda.device_of(dy_q):
        if dy_q.numel():
            backward_kernel[(programs,)](
                dy_q_at, dy_k_at, q, k, *map(contiguous, weights + tables), dq, dk, partials, *dy_strides, *strides,
                batch * length, length, first, group, eps, **constants, num_warps=_warps(warps, dy_q.itemsize),
            )  # fmt: skip
        if partials is not None:
            weights_kernel[(-(-dim // COLUMNS), 2)](
                partials, *dw, programs, DIM=dim, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8
            )  # fmt: skip
    return dq, dk


# ---- custom op -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("leapalign::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    dy_q: Tensor, dy_k: Tensor, q: Tensor | None, k: Tensor | None, weight_q: Tensor | None, weight_k: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, eps: float, first: int, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and the weights' gradients, which are empty where there is no weight and where they are not wanted."""
    dw = _weight_gradients(dy_q, (weight_q, weight_k), wanted)
    given = tuple(grad if grad.numel() else None for grad in dw)
    if runs_triton(dy_q):
        return *launch(dy_q, dy_k, q, k, (weight_q, weight_k), (cos, sin), eps, first, given), *dw
    dx = []
    for dy, x, weight, grad in zip((dy_q, dy_k), (q, k), (weight_q, weight_k), given, strict=True):
        found, summed = backward_reference(dy, x, weight, cos, sin, eps, first)
        dx.append(empty(dy).copy_(found))
        if grad is not None and summed is not None:
            grad.copy_(summed)
    return dx[0], dx[1], *dw


@_qk_norm_rope_backward.register_fake
def _(dy_q, dy_k, q, k, weight_q, weight_k, cos, sin, eps, first, wanted):  # type: ignore[no-untyped-def]
    return empty(dy_q), empty(dy_k), *_weight_gradients(dy_q, (weight_q, weight_k), wanted)


def _weight_gradients(dy: Tensor, weights: tuple[Tensor | None, Tensor | None], wanted: bool) -> tuple[Tensor, Tensor]:
    dw_q, dw_k = (dy.new_empty(0) if weight is None or not wanted else empty(weight) for weight in weights)
    return dw_q, dw_k


# ---- what the launchers start --------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """As FLUX (24 heads of 128, normalised and turned) and SD3.5 (of 64, normalised) start it, with and without dw."""
    if triton is None:
        return
    models = (("FLUX", 128, True), ("SD3.5", 64, False))
    for number, (model, dim, turned), wanted in product(("bf16", "fp32"), models, (True, False)):
        x, tables, strides = f"*{number}", ("cos_ptr", "sin_ptr"), ("batch_stride", "token_stride", "head_stride")
        constants, warps, _ = tiling(24, dim)
        pointers = ("dy_q_ptr", "dy_k_ptr", "q_ptr", "k_ptr", "weight_q_ptr", "weight_k_ptr", "dq_ptr", "dk_ptr")
        signature = dict.fromkeys(pointers, x) | dict.fromkeys(strides, "i32")
        signature |= dict.fromkeys((f"dy_{stride}" for stride in strides), "i32")
        fixed = constants | ({} if turned else dict.fromkeys(tables)) | ({} if wanted else {"partials_ptr": None})
        signature |= {name: "*fp32" for name in (*tables, "partials_ptr") if name not in fixed}
        aligned = tuple(signature)
        signature |= dict.fromkeys(("tokens", "length", "first", "group"), "i32") | {"eps": "fp32"}
        signature |= dict.fromkeys(fixed, "constexpr")
        name = f"qk_norm_rope backward {model} {number}{'' if wanted else ', no weights'}"
        sums = ("partials_ptr",) if wanted else ()
        launched = _warps(warps, {"bf16": 2, "fp32": 4}[number])
        yield Compilation(name, backward_kernel, signature, fixed, aligned, launched, unstreamed=sums)
        if wanted:
            signature = {"partials_ptr": "*fp32", "dw_q_ptr": x, "dw_k_ptr": x}
            fixed = {"DIM": dim, "ROWS": ROWS, "COLUMNS": COLUMNS}
            aligned = tuple(signature)
            signature |= {"programs": "i32"} | dict.fromkeys(fixed, "constexpr")
            name = f"qk_norm_rope weights {model} {number}"
            results = ("dw_q_ptr", "dw_k_ptr")
            yield Compilation(name, weights_kernel, signature, fixed, aligned, 8, unstreamed=results)
