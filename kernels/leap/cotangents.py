"""The cotangents that LeapAlign puts on the velocity, with the discounted nested gradient, in one pass.

With g = dL/dx_0 and u = (dv(x_j)/dx)^T c_j, the second leap's input gradient (LeapAlign, arXiv 2604.15311, eq. 10):

    c_j = -j g                    on v at x_j
    y   = g + alpha u             the gradient that arrives at x_j; alpha scales only the model's input
    c_k = -(k - j) y              on v at x_k

Each product and sum is float32 (float64 for float64 g) and is rounded once, to the dtype asked for: the model's, which
is where a cotangent goes next. Without u (alpha = 0: the legs are independent) y is g. Exact zeros stay zeros.

Bytes an element, float32 g with bfloat16 u and cotangents: 6 read, 2 written for each cotangent and 4 for y; both
cotangents 10. Torch's eager operations, from g and u to two bfloat16 cotangents: 54.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leapalign.kernels.compilation import Compilation
from leapalign.kernels.dispatch import jit, tl, triton
from leapalign.kernels.leap.prediction import accumulated, per_sample, rows, runs_triton

TILE = 1024  # elements of a program: two 16-byte accesses to float32 and one to bfloat16 in each of 128 threads


@torch.no_grad()
def cotangent_j(g: Tensor, j: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """c_j = -j g: (B, ...).

    Args:
        g: (B, ...) gradient at x_0.
        j: (B,) noise levels.
        dtype: of the result; None for g's.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(g, None, (j,))
    c_j: Tensor = torch.ops.leapalign.cotangents(g, None, 0.0, None, j, dtype or g.dtype, True, False)[0]
    return c_j


@torch.no_grad()
def cotangent_k(
    g: Tensor, u: Tensor | None, alpha: float, k: Tensor, j: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """c_k = -(k - j)(g + alpha u): (B, ...). Arguments as those of `cotangents`."""
    _check(g, u, (k, j))
    c_k: Tensor = torch.ops.leapalign.cotangents(g, u, alpha, k, j, dtype or g.dtype, False, False)[1]
    return c_k


@torch.no_grad()
def cotangents(
    g: Tensor, u: Tensor | None, alpha: float, k: Tensor, j: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(c_j, c_k), one launch for both legs, once u is known.

    Args:
        g: (B, ...) gradient at x_0.
        u: (B, ...) input gradient of the second leap, or None: it does not pass on.
        alpha: the discount.
        k, j: (B,) noise levels of each sample, k > j.
        dtype: of the results; None for g's.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(g, u, (k, j))
    c_j, c_k, _ = torch.ops.leapalign.cotangents(g, u, alpha, k, j, dtype or g.dtype, True, False)
    return c_j, c_k


@torch.no_grad()
def cotangent_and_carry(
    g: Tensor, u: Tensor | None, alpha: float, k: Tensor, j: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(c_k, y), for what goes on to a leap before k. y has g's dtype; arguments as those of `cotangents`."""
    _check(g, u, (k, j))
    _, c_k, y = torch.ops.leapalign.cotangents(g, u, alpha, k, j, dtype or g.dtype, False, True)
    return c_k, y


@torch.no_grad()
def leg_cotangent(
    y: Tensor, u: Tensor | None, alpha: float, coefficient: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(c, y + alpha u) of any method's leg, where c = coefficient (y + alpha u) is its cotangent: (B, ...) each.

    Args:
        y: (B, ...) gradient that arrived at the leg before.
        u: (B, ...) that leg's input gradient, or None: it passes nothing on.
        coefficient: (B,); -j for the last of LeapAlign's leaps, -(k - j) for the one before.
        dtype: of c; None for y's.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(y, u, (coefficient,))
    _, c, y = torch.ops.leapalign.cotangents(
        y, u, alpha, -coefficient, torch.zeros_like(coefficient), dtype or y.dtype, False, True
    )
    return c, y


# ---- reference -----------------------------------------------------------------------------------------------------


def cotangents_reference(
    g: Tensor, u: Tensor | None, alpha: float, k: Tensor, j: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(c_j, c_k, y) in plain torch."""
    wide = g.to(accumulated(g))
    y = wide if u is None else wide + alpha * u
    c_j, c_k = per_sample(-j, g) * wide, per_sample(j - k, g) * y
    return c_j.to(dtype), c_k.to(dtype), y.to(g.dtype)


# ---- kernel --------------------------------------------------------------------------------------------------------


@jit
def cotangents_kernel(
    g_ptr: tl.tensor,  # (B, N), rows g_stride apart
    u_ptr: tl.tensor,  # (B, N), rows u_stride apart, or None
    k_ptr: tl.tensor,  # (B,), or None without c_k
    j_ptr: tl.tensor,  # (B,)
    c_j_ptr: tl.tensor,  # (B, N) or None: not wanted; so the next two
    c_k_ptr: tl.tensor,
    y_ptr: tl.tensor,
    g_stride: tl.tensor,
    u_stride: tl.tensor,
    num: tl.tensor,  # N
    tiles: tl.tensor,  # ceil(N / TILE)
    alpha: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A tile of one sample: both legs' cotangents and the gradient that arrives at x_j, as far as they are wanted."""
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    at = program % tiles * TILE + tl.arange(0, TILE)
    inside = at < num
    j = tl.load(j_ptr + sample)
    y = tl.load(g_ptr + sample * g_stride + at, inside, other=0).to(tl.float32)
    if c_j_ptr is not None:
        tl.store(c_j_ptr + sample * num + at, -j * y, inside)
    if u_ptr is not None:
        y += alpha * tl.load(u_ptr + sample * u_stride + at, inside, other=0).to(tl.float32)
    if c_k_ptr is not None:
        tl.store(c_k_ptr + sample * num + at, (j - tl.load(k_ptr + sample)) * y, inside)
    if y_ptr is not None:
        tl.store(y_ptr + sample * num + at, y, inside)


def launch(
    g: Tensor,
    u: Tensor | None,
    alpha: float,
    k: Tensor | None,
    j: Tensor,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Write c_j, c_k and y, those of them that are there: (B, ...), contiguous."""
    g, u = rows(g), None if u is None else rows(u)
    batch, num = g.shape
    tiles = -(-num // TILE)
    if batch == 0:
        return
    levels = [None if level is None else level.to(torch.float32).contiguous() for level in (k, j)]
    strides = g.stride(0), 0 if u is None else u.stride(0)
    with torch.cuda.device_of(g):
        cotangents_kernel[(batch * tiles,)](
            g, u, *levels, *outputs, *strides, num, tiles, float(alpha), TILE=TILE, num_warps=4
        )  # fmt: skip


# ---- custom op -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("leapalign::cotangents", mutates_args=())
def _cotangents(
    g: Tensor, u: Tensor | None, alpha: float, k: Tensor | None, j: Tensor, dtype: torch.dtype, first: bool, carry: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """c_j if `first`, c_k if there is a k, y if `carry`, and empty tensors for the others. Constants to autograd."""
    c_j, c_k, y = _outputs(g, k, dtype, first, carry)
    if runs_triton(g, *[] if u is None else [u], c_j):
        launch(g, u, alpha, k, j, (c_j if first else None, None if k is None else c_k, y if carry else None))
        return c_j, c_k, y
    found = cotangents_reference(g, u, alpha, j if k is None else k, j, dtype)
    # Without u, y is g itself, which an operation may not return.
    return found[0] if first else c_j, c_k if k is None else found[1], found[2].clone() if carry else y


@_cotangents.register_fake
def _(
    g: Tensor, u: Tensor | None, alpha: float, k: Tensor | None, j: Tensor, dtype: torch.dtype, first: bool, carry: bool
) -> tuple[Tensor, ...]:
    return _outputs(g, k, dtype, first, carry)


def _outputs(
    g: Tensor, k: Tensor | None, dtype: torch.dtype, first: bool, carry: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wanted = ((first, dtype), (k is not None, dtype), (carry, g.dtype))
    c_j, c_k, y = (torch.empty(g.shape if given else (0,), dtype=kind, device=g.device) for given, kind in wanted)
    return c_j, c_k, y


def _check(g: Tensor, u: Tensor | None, levels: tuple[Tensor, ...]) -> None:
    wrong = [tuple(s.shape) for s in levels if s.shape != g.shape[:1]]
    if wrong or g.ndim < 2 or 0 in g.shape[1:] or (u is not None and u.shape != g.shape):
        raise ValueError(
            f"g is {tuple(g.shape)}, u {None if u is None else tuple(u.shape)}, noise levels "
            f"{[tuple(s.shape) for s in levels]}: give g and u of one shape (B, ...) and levels (B,)"
        )


# ---- what the launcher starts --------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """The kernel as FLUX and SD3.5 start it: latents are 16 or 64 channels wide, so a sample is a multiple of 16."""
    if triton is None:
        return
    outputs = {"c_j": ("c_j_ptr",), "c_k": ("c_k_ptr",), "both": ("c_j_ptr", "c_k_ptr")}
    outputs["c_k, carry"] = ("c_k_ptr", "y_ptr")
    for g, model in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        for kind, wanted in outputs.items():
            given = ("g_ptr", "j_ptr", *wanted, *(() if kind == "c_j" else ("u_ptr", "k_ptr")))
            pointers = {"g_ptr": f"*{g}", "u_ptr": f"*{model}", "k_ptr": "*fp32", "j_ptr": "*fp32"}
            pointers |= {"c_j_ptr": f"*{model}", "c_k_ptr": f"*{model}", "y_ptr": f"*{g}"}
            constants = {name: None for name in pointers if name not in given} | {"TILE": TILE}
            signature = pointers | {"g_stride": "i32", "u_stride": "i32", "num": "i32", "tiles": "i32", "alpha": "fp32"}
            signature |= dict.fromkeys(constants, "constexpr")
            aligned = (*(name for name in pointers if name in given), "g_stride", "u_stride", "num")
            name = f"cotangents {kind} {g}, model {model}"
            levels = tuple(level for level in ("k_ptr", "j_ptr") if level in given)
            yield Compilation(name, cotangents_kernel, signature, constants, aligned, unstreamed=levels)
