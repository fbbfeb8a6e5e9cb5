"""Host kernels: arithmetic on tensors in CPU memory, in C++ (csrc/), with a torch fallback that gives the same bits.

The module ``_host`` is built by CMake when the package is installed. Where it is missing (no C++ compiler was found,
or a bare checkout is on the path) everything here still works, through torch, and the first call says so in one line.
"""

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from leapalign.kernels import rounding

native: ModuleType | None
try:
    from leapalign.kernels import _host

    native, missing = _host, ""
except ImportError as error:
    native, missing = None, str(error)

CHUNK = 4096  # elements that one partial sum covers
LANES = 16  # independent sums in a chunk
SLAB = 256 * CHUNK  # elements that the fallback widens to float64 at a time: 8 MiB


@functools.cache
def _say_once() -> None:
    logging.getLogger(__name__).warning(
        "leapalign's native module is missing (%s): torch computes the same bits, several times slower; "
        "reinstall leapalign with a C++ compiler to build it",
        missing,
    )


def round_stochastic(
    x: Tensor,
    seed: int,
    step: int,
    parameter: int,
    *,
    offset: int = 0,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Round fp32 to bf16 stochastically, exactly as ``leapalign.kernels.rounding.round_stochastic`` defines it.

    Args:
        x: any shape, contiguous, float32, in CPU memory (pinned or not).
        seed: of the run, 0 .. 2^64 - 1.
        step: optimizer step, 0 .. 2^32 - 1.
        parameter: index of the parameter in the model, 0 .. 2^32 - 1.
        offset: flat index in its parameter of x's first element, where x is a part of it.
        out: bfloat16 tensor of x's shape, contiguous, to write into.
        threads: at most that many; torch.get_num_threads() by default. The bits do not depend on it.

    Returns:
        bfloat16 of x's shape (out, where it was given).

    Raises:
        ValueError: a wrong dtype, shape, layout or device, or a coordinate out of its range.
    """
    _check_host(x)
    if native is None:
        _say_once()
        return rounding.round_stochastic(x, seed, step, parameter, offset=offset, out=out)
    out = rounding.checked_output(x, out)
    rounding.check_stream(seed, step, parameter, offset, x.numel())
    native.round_stochastic_into(
        x.detach().view(-1), out.view(-1), seed, step, parameter, offset, threads or torch.get_num_threads()
    )
    return out


def sum_of_squares(x: Tensor, *, threads: int | None = None) -> float:
    """Sum of the squares of all elements, in double and in a fixed order: a gradient's share in the global norm.

    Each square is exact in double. Within a chunk of 4,096 elements, lane l of 16 sums elements l, l + 16, l + 32, ...;
    lanes, then chunks, are summed in pairs of neighbours. With n elements the relative error is at most
    (256 + 4 + ceil(log2(n / 4096))) 2^-53, under 4e-14 for any model. An inf or nan element gives inf or nan.

    Args:
        x: any shape, contiguous, bfloat16 or float32 (by torch), in CPU memory.
        threads: at most that many; torch.get_num_threads() by default. The result does not depend on it, bit for bit.

    Raises:
        ValueError: a wrong dtype, layout or device.
    """
    _check_host(x)
    if x.dtype not in (torch.bfloat16, torch.float32) or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} with strides {tuple(x.stride())}; sum_of_squares reads contiguous bfloat16 or float32"
        )
    flat = x.detach().view(-1)
    if x.dtype == torch.float32:
        return _sum_of_squares_in_torch(flat)
    if native is not None:
        return float(native.sum_of_squares_bf16(flat, threads or torch.get_num_threads()))
    _say_once()
    return _sum_of_squares_in_torch(flat)


def _sum_of_squares_in_torch(flat: Tensor) -> float:
    partial = [torch.zeros(0, dtype=torch.float64)]
    for slab in flat.split(SLAB):
        square = slab.double().square()
        rows = torch.nn.functional.pad(square, (0, -square.numel() % CHUNK)).view(-1, CHUNK // LANES, LANES)
        lanes = torch.zeros_like(rows[:, 0])
        for row in rows.unbind(1):  # torch.sum promises no order
            lanes = lanes + row
        partial.append(_fold(lanes))
    return float(_fold(torch.cat(partial)[None]))


def _fold(values: Tensor) -> Tensor:
    """Sum the last dimension in pairs of neighbours: (rows, n) -> (rows,)."""
    while values.shape[-1] > 1:
        values = torch.nn.functional.pad(values, (0, values.shape[-1] % 2)).unflatten(-1, (-1, 2))
        values = values[..., 0] + values[..., 1]
    return values.sum(-1)  # of one value, or of none


def _check_host(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"x is on {x.device}; host kernels read CPU memory")
