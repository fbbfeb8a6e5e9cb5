"""Runs for the host kernels' tests: tensors of every format, gradients of every kind, and what the same bits are."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.kernels.adamw8bit.definition import Hyper, split_residual
from leapalign.kernels.adamw8bit.quantize import blocks_of
from leapalign.kernels.host import native as host
from leapalign.kernels.host.pool import Handle

HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=3)
FORMATS = ["float32", "bfloat16", "residual", "master"]
AVERAGES = [None, torch.bfloat16, torch.float32]


def installed() -> bool:
    try:
        importlib.metadata.distribution("leapalign")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_native = pytest.mark.skipif(
    host.native is None and not installed(), reason="a bare checkout has no native module: `make test` installs it"
)
# The kernels of each instruction set that this processor has.
every_isa = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name not in host.instruction_sets(), reason=f"needs a processor with {name} and the native module"
            ),
        )
        for name in ("scalar", "avx2", "avx512bw", "avx512")
    ],
)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(count: int, low: float, high: float, seed: int) -> Tensor:
    return torch.empty(count).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def _zero_blocks(count: int, seed: int) -> Tensor:
    """Every second block is zero, with both signs."""
    return torch.where(torch.arange(count) // 256 % 2 == seed % 2, 0.0, 1.0) * randn(count, seed=seed)


def _one_huge(count: int, seed: int) -> Tensor:
    x = randn(count, seed=seed)
    x[seed % 256 :: 256] *= 1e6
    return x


def _any_size(count: int, seed: int) -> Tensor:
    """Blocks of any size that float32 has. Over 1.8e19 the square is infinite, and then the absmax of √v is."""
    sizes = torch.pow(10.0, uniform(blocks_of(count), -44.0, 38.0, seed + 1))
    return randn(count, seed=seed).clamp(-3, 3) * sizes.repeat_interleave(256)[:count]


# (count, seed) -> (count,) float32, finite also as bfloat16.
GRADIENTS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda count, seed: randn(count, seed=seed),
    "lognormal": lambda count, seed: randn(count, seed=seed) * randn(count, seed=seed + 1).mul(3).exp(),
    "cauchy": lambda count, seed: randn(count, seed=seed) / randn(count, seed=seed + 1),
    "zero blocks": _zero_blocks,
    "zero": lambda count, seed: randn(count, seed=seed) * 0,
    "subnormal": lambda count, seed: randn(count, seed=seed) * 1e-41,
    "subnormal squares": lambda count, seed: randn(count, seed=seed) * 1e-21,
    "one huge": _one_huge,
    "any size": _any_size,
    "largest": lambda count, seed: randn(count, seed=seed).sign() * 3.3e38,
}


def run_of(weights: str, average: torch.dtype | None, count: int, seed: int, size: float = 1.0) -> dict[str, Any]:
    """Every tensor that `update` takes for a run of this format, by the name of its argument, before the first step.

    Args:
        weights: of FORMATS.
        average: its dtype, or None.
        size: standard deviation of the weights.
    """
    w = randn(count, seed=seed) * size
    tensors: dict[str, Any] = {
        "weights": w.clone() if weights == "float32" else w.bfloat16(),
        "codes_m": torch.zeros(count, dtype=torch.uint8),
        "absmax_m": torch.zeros(blocks_of(count)),
        "codes_v": torch.zeros(count, dtype=torch.uint8),
        "absmax_v": torch.zeros(blocks_of(count)),
    }
    if weights == "residual":
        tensors["residual"] = torch.empty(count, dtype=torch.int8)
        split_residual(w, tensors["weights"], tensors["residual"])
    if weights == "master":
        tensors["master"] = w
    if average is not None:
        tensors["ema"] = (randn(count, seed=seed + 1) * size).to(average)
    return tensors


def copied(tensors: dict[str, Tensor], *, unaligned: bool = False) -> dict[str, Any]:
    """Copies of tensors; unaligned ones begin at the second element of a larger one."""
    if not unaligned:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    copies = {name: tensor.new_empty(tensor.numel() + 1)[1:] for name, tensor in tensors.items()}
    return {name: copy.copy_(tensors[name]) for name, copy in copies.items()}


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, int]:
    """Names of the tensors whose bits differ, and in how many elements. A nan equals any other."""
    counts = {name: int(unequal(ours[name], theirs[name]).sum()) for name in theirs}
    return {name: count for name, count in counts.items() if count}


def unequal(a: Tensor, b: Tensor) -> Tensor:
    """Where the bits of two tensors of one shape and dtype differ. A nan equals any other."""
    assert a.shape == b.shape and a.dtype == b.dtype
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}.get(a.dtype, a.dtype)
    return (a.view(integers) != b.view(integers)) & ~(a.isnan() & b.isnan())


def busy() -> Handle:
    """Hands over work for some tenths of a second and returns the handle of the last of it."""
    average, weights = torch.zeros(1 << 20, dtype=torch.bfloat16), torch.ones(1 << 20)
    with host.instruction_set("scalar"):
        return [host.ema(average, weights, 0.9, threads=1) for _ in range(30)][-1]
