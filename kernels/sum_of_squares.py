"""Sum of squares in double and in one fixed order: a gradient's share in the global norm, and whether it is finite.

    s = Σ x_i²

Each square is exact in double and none overflows, so s is finite exactly if every x_i is: one pass gives the norm to
clip by and the guard of the update (`adamw8bit_triton.update_triton`), on the device, without a wait.

The order is that of `kernels.pairwise`, so that a step has the same clipping factor wherever it is made: of a chunk of
4,096 elements, lane l of 16 adds elements l, l + 16, ... in turn; lanes, and then chunks, are added in pairs of
neighbours, as if zeros followed the last. No atomics: Triton, the host and the reference have the same bits. With
n elements the relative error is at most (256 + 4 + ceil(log2(n / 4096))) 2^-53, under 4e-14 for any model.

Bytes an element: 2 (bf16) or 4 read, and 8/65536 written and read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leapalign.kernels.compilation import Compilation
from leapalign.kernels.dispatch import jit, reaches, tl, triton
from leapalign.kernels.host import native as host
from leapalign.kernels.pairwise_sum import CHUNK, LANES, sum_of_squares_reference

CHUNKS = 16  # of a program, a power of two: with one warp 8 lanes a thread, 16 bytes of bf16
AHEAD = 16  # turns that are loaded together: 8 KiB of bf16 on the way to a program
FAN = 1024  # sums that a program of the second kernel adds, a power of two
WARPS = 1


# ---- kernel --------------------------------------------------------------------------------------------------------


@jit
def _fold(
    values,  # (a power of two,) fp64
    HALVINGS: tl.constexpr,
):
    """Their sum in pairs of neighbours. Not `tl.sum`, whose order is the layout's."""
    for _ in tl.static_range(HALVINGS):
        left, right = values.reshape(values.shape[0] // 2, 2).split()
        values = left + right
    return tl.sum(values)  # of one


@jit
def _square(
    x_ptr,  # (n,) fp32 or bf16
    sums_ptr,  # (programs,) fp64
    n,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
    HALVINGS: tl.constexpr,  # log2 of 16 CHUNKS
):
    """Program i: chunks i CHUNKS .."""
    begin = tl.program_id(0).to(tl.int64) * (CHUNKS * 4096)
    here = tl.minimum(n - begin, CHUNKS * 4096).to(tl.int32)
    place = tl.arange(0, CHUNKS)[:, None] * 4096 + tl.arange(0, 16)[None, :]
    total = tl.zeros((CHUNKS, 16), tl.float64)
    for turn in range(0, tl.minimum(here, 4096), AHEAD * 16):  # the first chunk is the longest
        for ahead in tl.static_range(AHEAD):
            offset = place + (turn + ahead * 16)
            x = tl.load(x_ptr + begin + offset, mask=offset < here, other=0)
            if x.dtype == tl.bfloat16:  # by its bits: the interpreter's conversion does not know subnormal bf16
                x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            x = x.to(tl.float64)
            total += x * x  # the product is exact: contracted or not, the same bits
    tl.store(sums_ptr + tl.program_id(0), _fold(total.reshape(CHUNKS * 16), HALVINGS))


@jit
def _add(
    values_ptr,  # (n,) fp64
    sums_ptr,  # (programs,) fp64
    n,
    FAN: tl.constexpr,
    HALVINGS: tl.constexpr,  # log2 of FAN
):
    """Program i: values i FAN .."""
    index = tl.program_id(0) * FAN + tl.arange(0, FAN)
    values = tl.load(values_ptr + index, mask=index < n, other=0)
    tl.store(sums_ptr + tl.program_id(0), _fold(values, HALVINGS))


# ---- launcher ------------------------------------------------------------------------------------------------------


def _tile() -> dict[str, int]:
    return {"CHUNKS": CHUNKS, "AHEAD": AHEAD, "HALVINGS": (CHUNKS * LANES).bit_length() - 1}


def _fan() -> dict[str, int]:
    return {"FAN": FAN, "HALVINGS": FAN.bit_length() - 1}


def _launch(x: Tensor) -> Tensor:
    sums = x.new_empty(triton.cdiv(x.numel(), CHUNKS * CHUNK), dtype=torch.float64)  # until they are added
    with torch.cuda.device_of(x):
        _square[(len(sums),)](x, sums, x.numel(), **_tile(), num_warps=WARPS)
        while len(sums) > 1:
            values, sums = sums, sums.new_empty(triton.cdiv(len(sums), FAN))
            _add[(len(sums),)](values, sums, len(values), **_fan(), num_warps=WARPS)
    return sums.view(())


# ---- custom op -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("leapalign::sum_of_squares", mutates_args=())
def _sum_of_squares(x: Tensor) -> Tensor:
    if x.numel() and reaches(x):
        return _launch(x)
    return sum_of_squares_torch(x)


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
    _check(x)
    return _sum_of_squares(x)


@torch.no_grad()
def sum_of_squares_torch(x: Tensor) -> Tensor:
    """`sum_of_squares` without Triton, the same bits: by the host's kernel in CPU memory, by the reference elsewhere.

    Args:
        x: as there.

    Raises:
        ValueError: as there.
    """
    _check(x)
    if x.device.type == "cpu" and type(x) is Tensor:  # no fake one
        return torch.tensor(host.sum_of_squares(x), dtype=torch.float64)
    return sum_of_squares_reference(x)


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


def _check(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} with strides {tuple(x.stride())}; sum_of_squares reads contiguous bfloat16 or float32"
        )


# ---- without a GPU -------------------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """Both dtypes; the length is an argument."""
    for dtype in ("fp32", "bf16"):
        yield Compilation(
            name=f"sum_of_squares.square {dtype}",
            kernel=_square,
            signature={"x_ptr": f"*{dtype}", "sums_ptr": "*fp64", "n": "i32", **dict.fromkeys(_tile(), "constexpr")},
            constants=_tile(),
            aligned=("x_ptr", "sums_ptr", "n"),
            num_warps=WARPS,
            unstreamed=("sums_ptr",),
        )
    yield Compilation(
        name="sum_of_squares.add",
        kernel=_add,
        signature={"values_ptr": "*fp64", "sums_ptr": "*fp64", "n": "i32", **dict.fromkeys(_fan(), "constexpr")},
        constants=_fan(),
        aligned=("values_ptr", "sums_ptr", "n"),
        num_warps=WARPS,
        unstreamed=("values_ptr", "sums_ptr"),
    )
