"""What the kernels over rows of tokens share: their launch, and sums over the tokens of a sample without atomics.

A row, the D features of one token, is held in the registers of one program. Vectors with one row a sample (shift,
scale, gate) have gradients that are sums over its T tokens, made in two stages:

    partial[b, i] = Σ rows of group i, in order, in fp32,      out[b] = Σ_i partial[b, i], in a fixed order.

The groups depend on T alone: a sample's bits depend neither on the run nor on the rest of its batch.

Bytes of the sums: 4 read and 4 written an element and vector of every `rows_of_group` rows, 0.44 an element and vector
at 4608 tokens. What one sample writes is small enough (3 MiB a vector of 3072) for the L2 cache of an A100 or H100.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leapalign.kernels.compilation import Compilation
from leapalign.kernels.dispatch import jit, reaches, tl, triton

LONGEST_ROW = 8192  # features, 16 a thread of the largest program; a longer row takes the reference
FORWARD_ROWS = 4  # of a program of a forward, which loads the sample's vectors once for them
GROUPS = 256  # at most, of a sample in the backward: two programs for each of the 132 multiprocessors of an H100
SUM_GROUPS, SUM_COLUMNS = 64, 32  # tile of the second stage: a row of it is 128 bytes


def wide(x: Tensor) -> Tensor:
    """x in float32 or better, the dtype of all arithmetic."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_rows(x: Tensor, rows: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    """Raise ValueError where named tensors are not like x, (B, T, D), or like the vectors of its samples, (B, D)."""
    if x.ndim != 3 or not x.dtype.is_floating_point or x.shape[-1] == 0:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it has the shape (batch, tokens, features), floating point")
    for wanted, tensors in ((tuple(x.shape), rows), ((x.shape[0], x.shape[2]), vectors)):
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != wanted or tensor.dtype != x.dtype or tensor.device != x.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; for x {tuple(x.shape)} pass "
                    f"{x.dtype} {wanted} on {x.device}"
                )


def runs_triton(x: Tensor) -> bool:
    """Whether the kernels take rows like x's; else the reference does."""
    return reaches(x) and x.dtype in (torch.bfloat16, torch.float32) and x.shape[-1] <= LONGEST_ROW


def with_rows(x: Tensor) -> Tensor:
    """x, copied where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block_of(features: int, a_thread: int = 16) -> dict[str, int]:
    """Block and warps of a kernel that holds a row with so many elements in a thread, 8 or more: 16 bytes in bf16."""
    block = 1 << max(features - 1, 1).bit_length()
    return {"BLOCK": block, "num_warps": min(max(block // (32 * a_thread), 1), 16)}


def rows_of_group(tokens: int) -> int:
    """Consecutive tokens of a sample whose gradients one program of the backward adds."""
    return max(4, -(-tokens // GROUPS))


@jit
def _sum_groups(
    partial_ptr: tl.tensor,  # (B, groups, width) fp32, contiguous
    out_ptr: tl.tensor,  # (B, width), contiguous
    groups: tl.tensor,
    width: tl.tensor,
    SUM_GROUPS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
) -> None:
    """Program (i, b): columns i SUM_COLUMNS .. of sample b."""
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)
    inside = columns < width
    total = tl.zeros((SUM_GROUPS, SUM_COLUMNS), tl.float32)
    for first in range(0, groups, SUM_GROUPS):
        group = first + tl.arange(0, SUM_GROUPS)
        rows = partial_ptr + (batch * groups + group[:, None]) * width
        total += tl.load(rows + columns[None, :], mask=(group < groups)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + batch * width + columns, result, mask=inside)


def sum_groups(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, groups, K, D) float32 -> (B, K, D) of dtype, the groups added in a fixed order."""
    batch, groups, count, features = partial.shape
    out = torch.empty(batch, count, features, dtype=dtype, device=partial.device)
    width = count * features
    _sum_groups[-(-width // SUM_COLUMNS), batch](
        partial, out, groups, width, SUM_GROUPS=SUM_GROUPS, SUM_COLUMNS=SUM_COLUMNS, num_warps=4
    )
    return out


FEATURES = (3072, 1536)  # FLUX.1-dev, SD3.5-medium
TYPES = {"bf16": "*bf16", "fp32": "*fp32"}


def compilation(
    name: str, kernel: Any, type_: str, features: int, *, a_thread: int = 16, **constants: int
) -> Iterator[Compilation]:
    """A kernel as it is launched on rows of a model: every pointer and stride a multiple of 16. None without triton.

    Args:
        name: of the kernel.
        kernel: its statistics and partial sums are float32, all other pointers have the model's type.
        type_: a key of TYPES.
        features: D.
        a_thread: as in `block_of`.
        constants: constexpr arguments other than D and BLOCK.
    """
    if triton is None:
        return
    launch = block_of(features, a_thread)
    constants = {"D": features, "BLOCK": launch["BLOCK"], **constants}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in ("statistics_ptr", "partial_ptr") else TYPES[type_]
        else:
            signature[argument] = "fp32" if argument == "eps" else "i32"
    aligned = tuple(name for name in signature if name.endswith(("_ptr", "_batch", "_row")))
    yield Compilation(
        f"{name} {type_} {features}",
        kernel,
        signature,
        constants,
        aligned,
        launch["num_warps"],
        unstreamed=tuple(name for name in signature if name == "statistics_ptr"),
    )


def compilations() -> Iterator[Compilation]:
    """The second stage, for any number of vectors and groups."""
    for type_, pointer in TYPES.items() if triton is not None else ():
        signature = {"partial_ptr": "*fp32", "out_ptr": pointer, "groups": "i32", "width": "i32"}
        constants = {"SUM_GROUPS": SUM_GROUPS, "SUM_COLUMNS": SUM_COLUMNS}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = ("partial_ptr", "out_ptr", "width")
        name = f"rows.sum_groups {type_}"
        yield Compilation(name, _sum_groups, signature, constants, aligned, unstreamed=("out_ptr",))
