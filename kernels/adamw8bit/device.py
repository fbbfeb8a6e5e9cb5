"""The step of `leapalign.kernels.adamw8bit.definition` in one pass over memory, in Triton: the same bits.

Equations, formats, draws and rounding are those of `adamw8bit.update`, which is the reference and what runs where
there is no Triton; the kernel is in `leapalign.kernels.adamw8bit.kernel`.

A non-finite gradient spoils its block of 256 here too. With `guard`, a number on the device, nothing is read or written
where that is not finite: no step has to wait for the host. `leapalign.kernels.sum_of_squares` of a unit's gradients
makes one.

The gradient may be the sum of a few outer products, Σ_r left_r ⊗ right_r (linear layers with one row of input a sample,
such as modulation): a program expands its tile in registers, adding the products in order of r, in fp32.

Bytes an element, bf16 weights: 12.06 as in `adamw8bit` with an fp32 gradient, 10.06 with a bf16 one, 8.06 with outer
products, whose factors stay in the cache. Source: as there; Triton's `tl.philox` for the counter's function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit import kernel as adamw8bit_kernel
from leapalign.kernels.adamw8bit.definition import Hyper, check_run
from leapalign.kernels.adamw8bit.quantize import BLOCK, blocks_of
from leapalign.kernels.dispatch import reaches

ROWS = 256  # of an outer product, expanded at a time by the reference: whole blocks whatever the columns


# ---- reference -----------------------------------------------------------------------------------------------------


def expand(left: Tensor, right: Tensor) -> Tensor:
    """Σ_r left_r ⊗ right_r in order of r, every product and sum rounded to fp32: (rows, cols) float32.

    Args:
        left: (terms, rows) float32 or bfloat16.
        right: (terms, cols) of the same.
    """
    gradient = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    product = torch.empty_like(gradient)  # fp32, as long as the sum is formed
    for column, row in zip(left.float(), right.float(), strict=True):
        gradient += torch.mul(column[:, None], row, out=product)
    return gradient


def _update_in_torch(
    tensors: dict[str, Tensor | None], left: Tensor | None, right: Tensor | None, first: int, **options: Any
) -> None:
    if left is None or right is None:
        adamw8bit.update(**tensors, first=first, **options)  # type: ignore[arg-type]
        return
    columns = right.shape[1]
    for row in range(0, left.shape[1], ROWS):
        gradient = expand(left[:, row : row + ROWS], right).view(-1)
        begin = row * columns
        end, blocks = begin + gradient.numel(), slice(begin // BLOCK, blocks_of(begin + gradient.numel()))
        views = {
            name: None if tensor is None else tensor[blocks if name.startswith("absmax") else slice(begin, end)]
            for name, tensor in tensors.items()
        }
        adamw8bit.update(**{**views, "gradient": gradient}, first=first + begin, **options)  # type: ignore[arg-type]


# ---- custom op -----------------------------------------------------------------------------------------------------

CHANGED = ("weights", "codes_m", "absmax_m", "codes_v", "absmax_v", "residual", "master", "ema")


@torch.library.custom_op("leapalign::adamw8bit", mutates_args=CHANGED)
def _step(
    weights: Tensor,
    gradient: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    codes_m: Tensor,
    absmax_m: Tensor,
    codes_v: Tensor,
    absmax_v: Tensor,
    residual: Tensor | None,
    master: Tensor | None,
    ema: Tensor | None,
    guard: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,  # as int64: that is what an operator takes
    parameter: int,
    first: int,
    ema_decay: float,
    scale: float,
) -> None:
    hp, seed = Hyper(lr, beta1, beta2, eps, weight_decay, step), seed % 2**64
    if weights.numel() == 0:
        return
    if reaches(weights):
        moments = (codes_m, absmax_m, codes_v, absmax_v)
        adamw8bit_kernel.launch(
            *(weights, gradient, left, right, *moments, residual, master, ema, guard),
            *(hp, seed, parameter, first, ema_decay, scale),
        )
        return
    if guard is not None and not guard.isfinite():
        return
    tensors = {
        "weights": weights,
        "gradient": gradient,
        "codes_m": codes_m,
        "absmax_m": absmax_m,
        "codes_v": codes_v,
        "absmax_v": absmax_v,
        "residual": residual,
        "master": master,
        "ema": ema,
    }
    _update_in_torch(
        tensors, left, right, first, hp=hp, seed=seed, parameter=parameter, ema_decay=ema_decay, scale=scale
    )


@_step.register_fake
def _(*_arguments: Any) -> None:
    return None


@torch.no_grad()
def update_triton(
    weights: Tensor,
    gradient: Tensor,
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
    guard: Tensor | None = None,
) -> None:
    """`adamw8bit.update` as a custom op: with Triton on a GPU, else in torch.

    Args:
        weights ... scale: as there.
        guard: () float32 or float64 on the same device. Where it is not finite nothing is changed.

    Raises:
        ValueError: as there.
    """
    check_run(
        *(weights, gradient, (codes_m, codes_v), (absmax_m, absmax_v), residual, master, ema),
        *(hp, seed, parameter, first, guard),
    )
    _step(
        *(weights, gradient, None, None, codes_m, absmax_m, codes_v, absmax_v, residual, master, ema, guard),
        *(hp.lr, hp.beta1, hp.beta2, hp.eps, hp.weight_decay, hp.step),
        *(_as_int64(seed), parameter, first, ema_decay, scale),
    )


@torch.no_grad()
def update_outer(
    weights: Tensor,
    left: Tensor,
    right: Tensor,
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
    guard: Tensor | None = None,
) -> None:
    """`update_triton` with the gradient left^T right of a matrix, which is never stored: see `expand`.

    Args:
        weights: (rows, cols) float32 or bfloat16, contiguous: a matrix, or some whole rows of one.
        left: (terms, rows) float32 or bfloat16, contiguous: cotangents of the layer's output.
        right: (terms, cols) float32 or bfloat16, contiguous: its inputs.
        codes_m ... guard: as in `update_triton`, flat, with rows * cols elements.

    Raises:
        ValueError: a wrong dtype, shape, layout, device or combination, or a coordinate of the draws out of its range.
    """
    for name, factor, axis in (("left", left, 0), ("right", right, 1)):
        fits = factor.ndim == 2 and weights.ndim == 2 and factor.shape[1] == weights.shape[axis]
        alike = factor.device == weights.device and factor.is_contiguous() and len(factor) == len(left)
        if not (fits and alike) or factor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{name} is {factor.dtype} {tuple(factor.shape)} on {factor.device}; update_outer takes contiguous "
                f"float32 or bfloat16 (terms, {'rows' if axis == 0 else 'cols'}) of weights (rows, cols), which are "
                f"{tuple(weights.shape)} on {weights.device}, with as many terms in left as in right"
            )
    if not weights.is_contiguous():
        raise ValueError(f"weights have strides {weights.stride()}; update_outer takes contiguous ones")
    flat = weights.view(-1)
    check_run(
        *(flat, None, (codes_m, codes_v), (absmax_m, absmax_v), residual, master, ema),
        *(hp, seed, parameter, first, guard),
    )
    _step(
        *(flat, None, left, right, codes_m, absmax_m, codes_v, absmax_v, residual, master, ema, guard),
        *(hp.lr, hp.beta1, hp.beta2, hp.eps, hp.weight_decay, hp.step),
        *(_as_int64(seed), parameter, first, ema_decay, scale),
    )


def _as_int64(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed
