"""Stochastic rounding of fp32 to bf16 with counter-based random bits: the definition, in torch.

A bf16 weight that is rounded to nearest loses every update smaller than half its last place: at a learning rate of
1e-5, nearly all of them. Rounded stochastically it moves by the right amount in expectation: a value that lies the
fraction f = (low 16 bits) / 65536 above the next bf16 towards zero is rounded away from zero with probability f,

    round(x) = sign(x) * ((bits(|x|) + r) >> 16),    r uniform in 0 .. 65535,

which over all 65,536 draws rounds up exactly 65536 f times. Special values:

- a bf16 value (zeros, subnormals and +-inf among them) is a fixed point, and the sign is always kept;
- a finite value never becomes inf: past the largest bf16, 3.3895e38, it saturates there;
- nan stays nan (made quiet; sign and upper payload bits are kept).

The draws belong to (seed, step, parameter, element) and to nothing else: the same bits whatever the number of
threads, the split of the range, the device or the language. They are Philox4x32-7 (Salmon, Moraes, Dror, Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011: seven rounds pass all of BigCrush; the usual ten are a margin
that rounding does not need), the function that Triton calls ``tl.philox``, so that device kernels have it too:

    key      = (seed mod 2^32, seed div 2^32)
    counter  = (block mod 2^32, block div 2^32, parameter, step),   block = element div 8
    draw     = 16 bits of word (element mod 8) div 2, the low half where element is even

Every (seed, step, parameter, block) has a key and a counter of its own, so no two elements of a run share their bits,
and eight draws cost one Philox. ``leapalign.kernels.host.native`` does the same in C++, bit for bit.
"""

import torch
from torch import Tensor

AVERAGE_STREAM = 1 << 61  # the draws of a bf16 average are those of elements that no parameter has
DRAWS_PER_BLOCK = 8
WORD = 0xFFFFFFFF
ROUNDS = 7  # of Philox
SLAB = 1 << 20  # elements at a time: the int64 words of a slab take 8 MiB, whatever the size of the tensor


def check_stream(seed: int, step: int, parameter: int, offset: int, count: int) -> None:
    """Raise ValueError where a coordinate of the draws does not fit the counter or the key."""
    for name, value, limit in (
        ("seed", seed, 2**64),
        ("step", step, 2**32),
        ("parameter", parameter, 2**32),
        ("offset + number of elements", offset + count, 2**62),
    ):
        if not 0 <= value < limit:
            raise ValueError(
                f"{name} is {value}; stochastic rounding counts from 0 to below 2**{limit.bit_length() - 1}"
            )
    if offset < 0:
        raise ValueError(f"offset is {offset}; it is the index of the first element and cannot be negative")


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = ROUNDS
) -> tuple[Tensor, ...]:
    """Philox4x32: four words of random bits for each counter.

    Args:
        counter: four int64 tensors of one shape with values in 0 .. 2^32 - 1.
        key: two integers in 0 .. 2^32 - 1.
        rounds: how often the words are mixed.

    Returns:
        Four int64 tensors of that shape with values in 0 .. 2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap above 2^63, their 64 bits are right all the same; the mask undoes the arithmetic shift.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((p1 >> 32) & WORD) ^ c1 ^ k0, ((p0 >> 32) & WORD) ^ c3 ^ k1
        c1, c3 = p1 & WORD, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def random_draws(
    seed: int, step: int, parameter: int, *, offset: int = 0, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The draws of elements offset .. offset + count - 1 of a parameter: (count,) int32 in 0 .. 65535.

    Args:
        seed: of the run, 0 .. 2^64 - 1.
        step: optimizer step, 0 .. 2^32 - 1.
        parameter: index of the parameter in the model, 0 .. 2^32 - 1.
        offset: flat index of the first element in its parameter.
        count: number of draws.
        device: where the draws are made; it does not change them.

    Raises:
        ValueError: a coordinate is out of its range.
    """
    check_stream(seed, step, parameter, offset, count)
    first, last = offset // DRAWS_PER_BLOCK, -(-(offset + count) // DRAWS_PER_BLOCK)
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    fixed = torch.zeros_like(block)
    words = philox4x32((block & WORD, block >> 32, fixed + parameter, fixed + step), (seed & WORD, seed >> 32))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    draws = torch.stack(halves, dim=-1).flatten()
    skipped = offset - first * DRAWS_PER_BLOCK
    return draws[skipped : skipped + count].to(torch.int32)


def round_with_draws(x: Tensor, draws: Tensor) -> Tensor:
    """Round fp32 to bf16 with the given draws.

    Args:
        x: any shape, float32.
        draws: int32 of the same shape (or one that broadcasts to it), in 0 .. 65535.

    Returns:
        bfloat16 of x's shape, away from zero where (low 16 bits of x) + draw >= 65536.
    """
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    infinity = 0x7F800000
    # nan + draw may wrap in int32; it is replaced below.
    rounded = ((magnitude + draws) >> 16).clamp(max=0x7F7F)
    rounded = torch.where(magnitude == infinity, 0x7F80, rounded)
    rounded = torch.where(magnitude > infinity, (magnitude >> 16) | 0x40, rounded)
    # Sign-extended by the shift, so that the sum lies in int16's range: -32768 + magnitude where the sign is set.
    signed = rounded + ((bits >> 31) << 15)
    return signed.to(torch.int16).view(torch.bfloat16)


def round_stochastic(
    x: Tensor, seed: int, step: int, parameter: int, *, offset: int = 0, out: Tensor | None = None
) -> Tensor:
    """Round fp32 to bf16 stochastically with the draws of (seed, step, parameter, element).

    Args:
        x: any shape, contiguous, float32, any device.
        seed: of the run, 0 .. 2^64 - 1.
        step: optimizer step, 0 .. 2^32 - 1.
        parameter: index of the parameter in the model, 0 .. 2^32 - 1.
        offset: flat index in its parameter of x's first element, where x is a part of it.
        out: bfloat16 tensor of x's shape and device, contiguous, to write into.

    Returns:
        bfloat16 of x's shape (out, where it was given).

    Raises:
        ValueError: a wrong dtype, shape or layout, or a coordinate out of its range.
    """
    out = checked_output(x, out)
    check_stream(seed, step, parameter, offset, x.numel())
    source, target = x.detach().view(-1), out.view(-1)
    for begin in range(0, source.numel(), SLAB):
        part = source[begin : begin + SLAB]
        draws = random_draws(seed, step, parameter, offset=offset + begin, count=part.numel(), device=x.device)
        target[begin : begin + SLAB] = round_with_draws(part, draws)
    return out


def checked_output(x: Tensor, out: Tensor | None) -> Tensor:
    """Check x and out of a rounding cast and return out, made where it is None. Raises ValueError."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} with strides {tuple(x.stride())}; the cast reads contiguous float32")
    if out is None:
        return torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    if out.dtype != torch.bfloat16 or out.shape != x.shape or out.device != x.device or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; "
            f"the cast writes contiguous bfloat16 {tuple(x.shape)} on {x.device}"
        )
    return out
