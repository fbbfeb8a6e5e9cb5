"""Cases of `bench.kernels.cases` over all parameters of a block: the 8-bit AdamW and the sum of squares.

Bytes a parameter with bf16 weights and gradients: weights and two 8-bit moments read and written, the gradient read,
and for moments in blocks of 256 two absmax read and written, 10.06. All optimizers are credited with these, whatever
their own blocks.

    torch eager     `leapalign.kernels.adamw8bit.definition.update`, a million elements at a time
    torch.compile   the same for all elements at once
    bitsandbytes    AdamW8bit: rounds weights to nearest
    torchao         AdamW8bit with stochastic rounding: plain code that it compiles itself
    FlashOptim      FlashAdamW without low bits of the weights (bf16): rounds to nearest

The first step from zero moments is compared with AdamW in float64, on the first elements; a rounding of the weights to
bfloat16 is up to 2^-8 of the largest, stochastically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels.cases import Case, Prepare, Shapes, Tensors, compiled, optional
from bench.kernels.timing import Call
from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit.definition import Hyper, adamw
from leapalign.kernels.adamw8bit.device import update_triton
from leapalign.kernels.adamw8bit.quantize import BLOCK, blocks_of, dequantize, quantize, signed_map, unsigned_map
from leapalign.kernels.rounding import round_stochastic
from leapalign.kernels.sum_of_squares import sum_of_squares

HYPER = Hyper(1e-2, 0.9, 0.999, 1e-8, 0.01, 1)  # a step of 1e-2 stands out of weights of 2e-2, rounded to bfloat16
_CHECKED = 1 << 20  # elements
_GROUP = {"lr": HYPER.lr, "betas": (HYPER.beta1, HYPER.beta2), "eps": HYPER.eps, "weight_decay": HYPER.weight_decay}


def cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """AdamW on bf16 weights with bf16 gradients, and the sum of squares of gradients in both dtypes."""
    count = shapes.parameters

    def weights_and_gradient(generator: torch.Generator) -> Tensors:
        weights, gradient = (torch.empty(count, dtype=torch.bfloat16, device=device) for _ in range(2))
        return weights.normal_(0, 0.02, generator=generator), gradient.normal_(0, 1e-3, generator=generator)

    ways: dict[str, Prepare | str] = {"leapalign": _ours(update_triton), "torch eager": _ours(adamw8bit.update)}
    maps = {"map_m": signed_map(device), "map_v": unsigned_map(device)}  # as constants they would be traced
    ways["torch.compile"] = _ours(partial(compiled(_at_once, device), **maps))
    for way, module, name, extra in (
        ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", {}),
        ("torchao", "torchao.optim", "AdamW8bit", {"bf16_stochastic_round": True}),
        ("FlashOptim", "flashoptim", "FlashAdamW", {"master_weight_bits": None}),
    ):
        found = optional(module)
        ways[way] = "not installed" if found is None else _theirs(getattr(found, name), extra)
    moved = 10 * count + 16 * blocks_of(count)
    yield Case("adamw8bit", "bf16", moved, weights_and_gradient, _first_step, ways)

    for dtype, words in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):

        def gradient(generator: torch.Generator, dtype: torch.dtype = dtype) -> Tensors:
            return (torch.empty(count, dtype=dtype, device=device).normal_(generator=generator),)

        sums: dict[str, Prepare | str] = {
            "leapalign": lambda tensors: lambda: (sum_of_squares(*tensors),),
            "torch eager": lambda tensors: lambda: (_squares(*tensors),),
        }
        together = compiled(_squares, device)
        sums["torch.compile"] = lambda tensors, together=together: lambda: (together(*tensors),)  # type: ignore[misc]
        yield Case("sum_of_squares", words, dtype.itemsize * count, gradient, _exact_squares, sums)


# ---- AdamW ---------------------------------------------------------------------------------------------------------


def _ours(update: Callable[..., None]) -> Prepare:
    def prepare(tensors: Tensors) -> Call:
        weights, gradient = tensors
        count, device = weights.numel(), weights.device
        codes_m, codes_v = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
        absmax_m, absmax_v = (torch.zeros(blocks_of(count), device=device) for _ in range(2))

        def call() -> Tensors:
            update(weights, gradient, codes_m, absmax_m, codes_v, absmax_v, HYPER, seed=1, parameter=0)
            return (weights[:_CHECKED],)

        return call

    return prepare


def _at_once(
    weights: Tensor, gradient: Tensor, codes_m: Tensor, absmax_m: Tensor, codes_v: Tensor, absmax_v: Tensor,
    hp: Hyper, *, seed: int, parameter: int, map_m: Tensor, map_v: Tensor,
) -> None:  # fmt: skip
    """`adamw8bit.update` of bf16 weights without its division into parts, which a compiler would write out."""
    m, v = dequantize(codes_m, absmax_m, map=map_m), dequantize(codes_v, absmax_v, map=map_v).square_()
    w, m, v = adamw(weights.float(), gradient.float(), m, v, hp)
    quantize(m, codes_m, absmax_m, map=map_m)
    quantize(v.sqrt(), codes_v, absmax_v, map=map_v, nonzero=True)
    round_stochastic(w, seed, hp.step, parameter, out=weights)


def _theirs(optimizer: Any, extra: dict[str, Any]) -> Prepare:
    def prepare(tensors: Tensors) -> Call:
        weights, gradient = tensors
        parameter = torch.nn.Parameter(weights.view(-1, BLOCK))
        parameter.grad = gradient.view_as(parameter)
        stepper = optimizer([parameter], **_GROUP, **extra)

        def call() -> Tensors:
            stepper.step()
            return (parameter.detach().view(-1)[:_CHECKED],)

        return call

    return prepare


def _first_step(tensors: Tensors) -> Tensors:
    weights, gradient = (tensor[:_CHECKED].double() for tensor in tensors)
    return (adamw(weights, gradient, torch.zeros_like(weights), torch.zeros_like(weights), HYPER)[0],)


# ---- sum of squares ------------------------------------------------------------------------------------------------


def _squares(x: Tensor) -> Tensor:
    return x.double().square().sum()


def _exact_squares(tensors: Tensors) -> Tensors:
    (x,) = tensors
    return (torch.stack([part.double().square().sum() for part in x.split(_CHECKED)]).sum(),)
