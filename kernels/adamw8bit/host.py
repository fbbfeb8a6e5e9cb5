"""The step of `leapalign.kernels.adamw8bit.definition` on the host, in C++ and in one pass over memory: the same bits.

Equations, formats, draws and rounding are those of `adamw8bit.update`, the reference, which also takes over where the
native module is missing. The C++ is in kernels/host/csrc/adamw8bit/. All bits are equal, of weights, states and
averages, for AVX-512, AVX2 and plain C++ and for any number of threads: values of the maps are looked up, products
and sums are not contracted, and where the line that gives a code's place leaves doubt, one number in 8192, the code is
looked up too.
(A nan may have another sign and payload.) Subnormals are kept, as there.

Bytes an element, bf16 weights: 10.06 with a bf16 gradient, 12.06 with an fp32 one, 8.06 with factors; more where the
gradient is checked here, which reads it once before.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit.definition import Hyper, check_run, scalars
from leapalign.kernels.adamw8bit.device import ROWS, expand
from leapalign.kernels.adamw8bit.quantize import BLOCK, blocks_of
from leapalign.kernels.host import native as host
from leapalign.kernels.host.pool import Finished, Handle


def update(
    weights: Tensor,
    gradient: Tensor | tuple[Tensor, Tensor],
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
    guard: float | None = None,
    threads: int | None = None,
) -> Handle:
    """`adamw8bit.update` by the threads of `leapalign.kernels.host.native`; returns at once.

    Args:
        weights: (n,) float32 or bfloat16, contiguous, in CPU memory, as all tensors are.
        gradient: (n,) float32 or bfloat16; or factors (left, right), (terms, rows) and (terms, cols) of them with
            rows * cols = n, whose sum of outer products in order of the terms, `adamw8bit_triton.expand`, is the
            gradient of the run. It is expanded a block at a time.
        codes_m ... scale: as there.
        guard: a number that is finite if the gradient is, such as its `sum_of_squares`: where it is not, nothing is
            changed. None: the gradient, as it is before it is scaled, is checked first, all of it.
        threads: at most that many; see `host.configure`. The bits do not depend on it.

    Returns:
        The update in progress. Its `wait` raises FloatingPointError if the gradient is not finite: nothing has changed.

    Raises:
        ValueError: a wrong dtype, shape, layout, device or combination, or a coordinate of the draws out of its range.
    """
    by = scalars(hp, scale)
    dense = gradient if isinstance(gradient, Tensor) else None
    check_run(
        *(weights, dense, (codes_m, codes_v), (absmax_m, absmax_v), residual, master, ema),
        *(hp, seed, parameter, first),
    )
    host.check_memory(weights, "weights")
    factors = () if isinstance(gradient, Tensor) else gradient
    if factors:
        _check_factors(*factors, weights.numel())
    for given in factors or (gradient,):
        assert isinstance(given, Tensor)
        host.refuse_overlap("update", weights, given)
    left, right = (factor.detach() for factor in factors) if factors else (None, None)
    arguments = tuple(
        None if tensor is None else tensor.detach()
        for tensor in (weights, dense, left, right, codes_m, absmax_m, codes_v, absmax_v, residual, master, ema)
    )

    def in_torch() -> None:
        _in_torch(arguments, hp, guard is not None, seed, parameter, first, ema_decay, scale)

    if guard is not None and not math.isfinite(guard):
        refused = Finished(_refuse)
        return Handle(lambda: refused, ())
    return host.start(
        in_torch,
        "adamw8bit",
        *arguments,
        *(seed, hp.step, parameter, first),
        *(by.gain, by.decay_m, by.decay_root, by.unit, by.root_gain, by.eps, by.decay_w),
        *(1 - ema_decay, guard is not None),
        threads=threads,
    )


def _refuse() -> None:
    raise FloatingPointError("the gradient is not finite: weights and states are as they were")


def _in_torch(
    arguments: tuple[Tensor | None, ...], hp: Hyper, guarded: bool, seed: int, parameter: int, first: int,
    ema_decay: float, scale: float,
) -> None:  # fmt: skip
    weights, dense, left, right, codes_m, absmax_m, codes_v, absmax_v, residual, master, ema = arguments
    assert weights is not None
    rows = 1 if left is None else left.shape[1]
    columns = weights.numel() if right is None else right.shape[1]

    def gradient(row: int) -> Tensor:
        if left is None or right is None:
            assert dense is not None
            return dense
        return expand(left[:, row : row + ROWS], right).view(-1)

    if not guarded and not all(gradient(row).isfinite().all() for row in range(0, rows, ROWS)):
        _refuse()
    for row in range(0, rows, ROWS):  # 256 rows are whole blocks
        piece = gradient(row)
        begin, end = row * columns, row * columns + piece.numel()
        part, blocks = slice(begin, end), slice(begin // BLOCK, blocks_of(end))
        states = {"codes_m": codes_m, "absmax_m": absmax_m, "codes_v": codes_v, "absmax_v": absmax_v}
        options = {"residual": residual, "master": master, "ema": ema}
        views: dict[str, Any] = {
            name: None if tensor is None else tensor[blocks if name.startswith("absmax") else part]
            for name, tensor in (states | options).items()
        }
        adamw8bit.update(
            weights[part], piece, hp=hp, seed=seed, parameter=parameter, first=first + begin, ema_decay=ema_decay,
            scale=scale, **views,
        )  # fmt: skip


def _check_factors(left: Tensor, right: Tensor, count: int) -> None:
    for name, factor in (("left", left), ("right", right)):
        fits = factor.ndim == 2 and factor.device.type == "cpu" and factor.is_contiguous()
        if not fits or factor.dtype not in host.FLOATS:
            raise ValueError(
                f"{name} is {factor.dtype} {tuple(factor.shape)} on {factor.device}; factors are contiguous float32 or "
                "bfloat16 matrices in CPU memory"
            )
    if len(left) != len(right) or left.shape[1] * right.shape[1] != count:
        raise ValueError(
            f"left is {tuple(left.shape)} and right {tuple(right.shape)}; the factors of {count} elements are "
            "(terms, rows) and (terms, cols) with rows * cols of them"
        )
