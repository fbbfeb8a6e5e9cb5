"""Sum of squares in double and in a fixed order: a gradient's share in the global norm, and whether it is finite.

    s = Σ x_i²

Each square is exact in double and none overflows, so s is finite exactly if every x_i is: one pass gives the norm to
clip by and the guard of the update (`adamw8bit_triton.update_triton`), on the device, without a wait.

The order is fixed by the length and the dtype, without atomics, so the bits are always the same: of 8,192 consecutive
elements, lane l of 1,024 adds elements l, l + 1024, ... in turn, and Triton the lanes; another kernel adds those sums,
1,024 at a time, until there is one. The relative error is below (8192 + 1024 log_1024(n)) 2^-53, 2e-12 for any model.
Torch (the reference), Triton and `host.sum_of_squares` add in different orders: their last bits differ.

Bytes an element: 2 (bf16) or 4 read, and 8/8192 written and read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leapalign.kernels.compilation import Compilation
from leapalign.kernels.dispatch import jit, reaches, tl, triton

LANES = 1024  # 8 a thread: 16 bytes of bf16
TURNS = 8
CHUNK = TURNS * LANES
SLAB = 1 << 20  # elements that the reference widens at a time: 8 MiB
WARPS = 4


# ---- reference -----------------------------------------------------------------------------------------------------


def _in_torch(x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for slab in x.view(-1).split(SLAB):
        total = total + slab.double().square().sum()
    return total


# ---- kernel --------------------------------------------------------------------------------------------------------


@jit
def _square(
    x_ptr,  # (n,) fp32 or bf16
    sums_ptr,  # (programs,) fp64
    n,
    TURNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program i: elements i TURNS LANES .."""
    begin = tl.program_id(0).to(tl.int64) * (TURNS * LANES)
    here = tl.minimum(n - begin, TURNS * LANES).to(tl.int32)
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    for turn in tl.static_range(TURNS):
        offset = turn * LANES + lane
        x = tl.load(x_ptr + begin + offset, mask=offset < here, other=0).to(tl.float64)
        total += x * x  # the product is exact: contracted or not, the same bits
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


@jit
def _add(
    values_ptr,  # (n,) fp64
    sums_ptr,  # (programs,) fp64
    n,
    LANES: tl.constexpr,
):
    """Program i: values i LANES .."""
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    values = tl.load(values_ptr + index, mask=index < n, other=0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(values))


# ---- launcher ------------------------------------------------------------------------------------------------------


def _launch(x: Tensor) -> Tensor:
    options = {"LANES": LANES, "num_warps": WARPS}
    sums = x.new_empty(triton.cdiv(x.numel(), CHUNK), dtype=torch.float64)  # until they are added
    with torch.cuda.device_of(x):
        _square[(len(sums),)](x, sums, x.numel(), TURNS=TURNS, **options)
        while len(sums) > 1:
            values, sums = sums, sums.new_empty(triton.cdiv(len(sums), LANES))
            _add[(len(sums),)](values, sums, len(values), **options)
    return sums.view(())


# ---- custom op -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("leapalign::sum_of_squares", mutates_args=())
def _sum_of_squares(x: Tensor) -> Tensor:
    if x.numel() and reaches(x):
        return _launch(x)
    return _in_torch(x)


@_sum_of_squares.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float64)


@torch.no_grad()
def sum_of_squares(x: Tensor) -> Tensor:
    """() float64 on x's device: the sum of the squares of all elements, finite exactly if they all are.

    Args:
        x: any shape, contiguous, float32 or bfloat16.

    Raises:
        ValueError: a wrong dtype or layout.
    """
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} with strides {tuple(x.stride())}; sum_of_squares reads contiguous bfloat16 or float32"
        )
    return _sum_of_squares(x)


@torch.no_grad()
def sum_of_squares_outer(left: Tensor, right: Tensor) -> Tensor:
    """() float64: the sum of the squares of left^T right, which is not formed. Plain torch, a few numbers a term.

        Σ_ij (Σ_r left_ri right_rj)² = Σ_rs (left_r · left_s) (right_r · right_s)

    The dot products are in double: the error is below 2 (rows + cols + terms²) 2^-53 of the sum over magnitudes.
    Infinite where Σ_r max|left_r| max|right_r| reaches the largest float32, before which no fp32 sum in
    `adamw8bit_triton.expand` overflows, and not finite where a factor is not.

    Args:
        left: (terms, rows) float32 or bfloat16.
        right: (terms, cols) of the same.
    """
    if not left.numel() or not right.numel():
        return torch.zeros((), dtype=torch.float64, device=left.device)
    a, b = left.double(), right.double()
    largest = (a.abs().amax(1) * b.abs().amax(1)).sum()
    total = ((a @ a.T) * (b @ b.T)).sum()
    return torch.where(largest < torch.finfo(torch.float32).max / 2, total, largest / 0)


# ---- without a GPU -------------------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """Both dtypes; the length is an argument."""
    for dtype in ("fp32", "bf16"):
        yield Compilation(
            name=f"sum_of_squares.square {dtype}",
            kernel=_square,
            signature={
                "x_ptr": f"*{dtype}",
                "sums_ptr": "*fp64",
                "n": "i32",
                "TURNS": "constexpr",
                "LANES": "constexpr",
            },
            constants={"TURNS": TURNS, "LANES": LANES},
            aligned=("x_ptr", "sums_ptr", "n"),
            num_warps=WARPS,
        )
    yield Compilation(
        name="sum_of_squares.add",
        kernel=_add,
        signature={"values_ptr": "*fp64", "sums_ptr": "*fp64", "n": "i32", "LANES": "constexpr"},
        constants={"LANES": LANES},
        aligned=("values_ptr", "sums_ptr", "n"),
        num_warps=WARPS,
    )
