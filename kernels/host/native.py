"""Host kernels: arithmetic on tensors in CPU memory, in C++ (csrc/), with a torch fallback that gives the same bits.

The module ``_host`` is built by CMake when the package is installed. Where it is missing (no C++ compiler was found,
or a bare checkout is on the path) everything here still works, through torch, and the first call says so in one line.

The module owns its threads. They take work in the order in which it is handed over, one piece after the other, and
sleep in between, so that torch's own threads have the cores. What returns a `Handle` does not wait; what returns a
value does. A child process of a fork has threads of its own; what was handed over before is its parent's.

AVX-512, AVX2 and plain C++ give the same bits, for any number of threads. The best that the processor has is chosen;
the environment variable LEAPALIGN_ISA (avx512, avx512bw without VBMI, avx2 or scalar), or `instruction_set`, takes
another. Subnormal numbers are kept there, whatever torch.set_flush_denormal says: flushed, they would give other bits
than torch and GPUs do. Blocks that have them take several times as long (`pytest bench/micro -k subnormal`): squares of
gradients below 1e-19 are such, zeros are not.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from leapalign.kernels import rounding
from leapalign.kernels.host.pool import Finished, Handle
from leapalign.kernels.pairwise_sum import sum_of_squares_reference

native: ModuleType | None
try:
    from leapalign.kernels.host import _host

    if not hasattr(_host, "adamw8bit"):
        raise ImportError(f"{_host.__file__} was built from an older version")
    native, missing = _host, ""
    atexit.register(_host.stop)  # ends what is left of the work while its tensors are there
except ImportError as error:
    native, missing = None, str(error)

SLAB = 1 << 20  # elements that the fallback widens at a time
FLOATS = (torch.float32, torch.bfloat16)

_threads: int | None = None


@functools.cache
def _say_once() -> None:
    logging.getLogger(__name__).warning(
        "leapalign's native module is missing (%s): torch computes the same bits, several times slower; "
        "reinstall leapalign with a C++ compiler to build it",
        missing,
    )


# ---- threads and instruction sets ----------------------------------------------------------------------------------


def configure(*, threads: int | None = None, cores: Sequence[int] | None = None) -> None:
    """Set how many threads host kernels have and where they run. Waits for what was handed over.

    Args:
        threads: at most so many a call, where the call does not say it; None for torch.get_num_threads() at the time.
        cores: numbers of cores; thread i runs on core i, counted round. None for wherever the system puts it.

    Raises:
        ValueError: no thread, a core that this process may not use, or a system that does not pin threads.
    """
    global _threads
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}; host kernels need at least 1, or None for torch's number")
    if cores and not hasattr(os, "sched_getaffinity"):
        raise ValueError("this system does not pin threads to cores: Linux does")
    usable = os.sched_getaffinity(0) if cores else set()
    if cores and (others := sorted(set(cores) - usable)):
        raise ValueError(f"core {others[0]} is not among those of this process, {_ranges(usable)}")
    if native is not None:
        native.pin(list(cores or ()))
    _threads = threads


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def instruction_sets() -> list[str]:
    """Those that this build and this processor have, the best one last; none without the native module."""
    return [] if native is None else list(native.isas())


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Host kernels that are called inside take this one: "scalar", "avx2", "avx512bw" or "avx512", with the same bits.

    Raises:
        ValueError: the build or the processor does not have it.
    """
    module = _chosen(name, "instruction_set")
    before = module.isa()
    module.use_isa(name)
    try:
        yield
    finally:
        module.use_isa(before)


def _chosen(name: str, asked_by: str) -> ModuleType:
    if native is None or name not in native.isas():
        raise ValueError(
            f"{asked_by}: {name!r} is not among {instruction_sets()}, the instruction sets of this build and processor"
        )
    return native


if native is not None and os.environ.get("LEAPALIGN_ISA"):
    _chosen(os.environ["LEAPALIGN_ISA"], "LEAPALIGN_ISA").use_isa(os.environ["LEAPALIGN_ISA"])


def number_of_threads(wanted: int | None) -> int:
    """What a call uses that wants so many, or None for what is configured.

    Raises:
        ValueError: none, or fewer.
    """
    if wanted is not None and wanted < 1:
        raise ValueError(f"threads={wanted}; host kernels need at least 1, or None for what is configured")
    return wanted or _threads or torch.get_num_threads()


# ---- rounding and sums ---------------------------------------------------------------------------------------------


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
        threads: at most that many; see `configure`. The bits do not depend on it.

    Returns:
        bfloat16 of x's shape (out, where it was given).

    Raises:
        ValueError: a wrong dtype, shape, layout or device, or a coordinate out of its range.
    """
    check_memory(x)
    if native is None:
        _say_once()
        return rounding.round_stochastic(x, seed, step, parameter, offset=offset, out=out)
    out = rounding.checked_output(x, out)
    rounding.check_stream(seed, step, parameter, offset, x.numel())
    source, target = x.detach().view(-1), out.view(-1)
    start = functools.partial(native.round_stochastic, source, target, seed, step, parameter, offset)
    several = number_of_threads(threads)
    Handle(lambda: start(several), (source, target)).wait()
    return out


def sum_of_squares(x: Tensor, *, threads: int | None = None) -> float:
    """Sum of the squares of all elements, in double and in a fixed order: a gradient's share in the global norm.

    Each square is exact in double. Within a chunk of 4,096 elements, lane l of 16 sums elements l, l + 16, l + 32, ...;
    lanes, then chunks, are summed in pairs of neighbours. With n elements the relative error is at most
    (256 + 4 + ceil(log2(n / 4096))) 2^-53, under 4e-14 for any model. An inf or nan element gives inf or nan.

    Args:
        x: any shape, contiguous, bfloat16 or float32, in CPU memory.
        threads: at most that many; see `configure`. The result does not depend on it, bit for bit.

    Raises:
        ValueError: a wrong dtype, layout or device.
    """
    check_memory(x)
    if x.dtype not in FLOATS or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} with strides {tuple(x.stride())}; sum_of_squares reads contiguous bfloat16 or float32"
        )
    flat = x.detach().view(-1)
    if native is None:
        _say_once()
        return float(sum_of_squares_reference(flat))
    start, several = native.sum_of_squares, number_of_threads(threads)
    return Handle(lambda: start(flat, several), (flat,)).result()


# ---- in place, handed over -----------------------------------------------------------------------------------------


def accumulate(total: Tensor, x: Tensor, *, threads: int | None = None) -> Handle:
    """total ← total + x, added in fp32 and rounded once to total's dtype, to nearest. 6 to 12 bytes an element.

    Args:
        total: any shape, contiguous, bfloat16 or float32, in CPU memory; written.
        x: of total's shape, contiguous, bfloat16 or float32, in CPU memory; it shares no memory with total.
        threads: at most that many; see `configure`. The bits do not depend on it.

    Raises:
        ValueError: a wrong dtype, shape, layout or device.
    """
    _check_pair(total, x, "accumulate", FLOATS, FLOATS)
    target, source = total.detach().view(-1), x.detach().view(-1)

    def in_torch() -> None:
        for part, more in zip(target.split(SLAB), source.split(SLAB), strict=True):
            part.copy_(part.float() + more.float())

    return start(in_torch, "accumulate", target, source, threads=threads)


def ema(
    average: Tensor,
    weights: Tensor,
    decay: float,
    *,
    seed: int = 0,
    step: int = 0,
    parameter: int = 0,
    first: int = 0,
    threads: int | None = None,
) -> Handle:
    """average ← average + (1 - decay)(weights - average), each operation rounded to fp32, as in `adamw8bit.update`.

    A bfloat16 average is rounded stochastically, with the draws that `adamw8bit.update` has for it.

    Args:
        average: any shape, contiguous, bfloat16 or float32, in CPU memory; written.
        weights: of average's shape, contiguous, bfloat16 or float32, in CPU memory; shares no memory with it.
        decay: in [0, 1).
        seed, step, parameter: of the draws, as in `round_stochastic`.
        first: index in the parameter of the first element.
        threads: at most that many; see `configure`. The bits do not depend on it.

    Raises:
        ValueError: a wrong dtype, shape, layout or device, or a number out of its range.
    """
    _check_pair(average, weights, "ema", FLOATS, FLOATS)
    if not 0 <= decay < 1:
        raise ValueError(f"ema: decay={decay} must be in [0, 1)")
    place = rounding.AVERAGE_STREAM + first
    rounding.check_stream(seed, step, parameter, place if first >= 0 else first, average.numel())
    target, source = average.detach().view(-1), weights.detach().view(-1)

    def in_torch() -> None:
        for begin in range(0, target.numel(), SLAB):
            part, w = target[begin : begin + SLAB], source[begin : begin + SLAB].float()
            old = part.float()
            new = old + (w - old) * (1 - decay)
            if part.dtype == torch.bfloat16:
                rounding.round_stochastic(new, seed, step, parameter, offset=place + begin, out=part)
            else:
                part.copy_(new)

    return start(in_torch, "ema", target, source, 1 - decay, seed, step, parameter, first, threads=threads)


def copy(to: Tensor, source: Tensor, *, threads: int | None = None) -> Handle:
    """to ← source, by as many threads as there are: one seldom fills the memory's bandwidth.

    Args:
        to: any shape and dtype, contiguous, in CPU memory; written.
        source: of its shape and dtype, contiguous, in CPU memory; shares no memory with it.
        threads: at most that many; see `configure`.

    Raises:
        ValueError: a wrong dtype, shape, layout or device.
    """
    _check_pair(to, source, "copy", (source.dtype,), (to.dtype,))
    target, origin = (tensor.detach().view(-1).view(torch.uint8) for tensor in (to, source))
    return start(lambda: target.copy_(origin), "copy", target, origin, threads=threads)


def start(in_torch: Callable[[], object], name: str, *arguments: object, threads: int | None) -> Handle:
    """Hand over a kernel of the native module by its name, or do the same in torch at once where there is none."""
    tensors = tuple(argument for argument in arguments if isinstance(argument, Tensor))
    several = number_of_threads(threads)
    if native is not None:
        kernel = getattr(native, name)
        return Handle(lambda: kernel(*arguments, several), tensors)
    _say_once()
    finished = Finished(in_torch)
    return Handle(lambda: finished, tensors)


def check_memory(x: Tensor, name: str = "x") -> None:
    """Whether host kernels can read a tensor.

    Raises:
        ValueError: it is on a device, or a fake one.
    """
    if x.device.type != "cpu" or isinstance(x, FakeTensor):
        where = "a fake tensor" if isinstance(x, FakeTensor) else f"on {x.device}"
        raise ValueError(f"{name} is {where}; host kernels take CPU memory")


def _check_pair(
    to: Tensor, source: Tensor, name: str, to_dtypes: tuple[torch.dtype, ...], source_dtypes: tuple[torch.dtype, ...]
) -> None:
    for tensor, dtypes in ((to, to_dtypes), (source, source_dtypes)):
        check_memory(tensor)
        if tensor.dtype not in dtypes or tensor.shape != to.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} takes two contiguous tensors of one shape, {' or '.join(map(str, to_dtypes))} and "
                f"{' or '.join(map(str, source_dtypes))}; here are {to.dtype} {tuple(to.shape)} with strides "
                f"{to.stride()} and {source.dtype} {tuple(source.shape)} with strides {source.stride()}"
            )
    refuse_overlap(name, to, source)


def refuse_overlap(name: str, written: Tensor, other: Tensor) -> None:
    """Threads read one in pieces while they write the other.

    Raises:
        ValueError: two contiguous tensors share memory.
    """
    begin, other_begin = written.data_ptr(), other.data_ptr()
    if begin < other_begin + other.nbytes and other_begin < begin + written.nbytes:
        raise ValueError(f"{name}: two of the tensors share memory, one of which is written; pass a clone of the other")
