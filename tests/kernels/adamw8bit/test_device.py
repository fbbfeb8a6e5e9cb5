"""The custom op around the Triton step: what tracing sees, what runs without Triton, and the interpreter's checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.kernels import pairwise_sum as pairwise
from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit import device as adamw8bit_triton
from leapalign.kernels.adamw8bit.definition import Hyper
from leapalign.kernels.adamw8bit.device import update_outer, update_triton
from leapalign.kernels.adamw8bit.quantize import BLOCK, blocks_of
from leapalign.kernels.host import native as host
from leapalign.kernels.pairwise_sum import sum_of_squares_reference
from leapalign.kernels.sum_of_squares import sum_of_squares
from tests.kernels.interpreter import run_interpreted

HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=1)
OPTIONS: dict[str, Any] = {"hp": HYPER, "seed": 2**64 - 3, "parameter": 4, "ema_decay": 0.9, "scale": 0.5}
COUNT = 2 * BLOCK + 9


def test_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the interpreter is Triton's: pip install triton")
    run_interpreted("check_adamw8bit")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors_of(count: int, **more: Tensor) -> dict[str, Any]:
    codes, absmax = torch.zeros(count, dtype=torch.uint8), torch.zeros(blocks_of(count))
    return {
        "weights": randn(count, seed=1).bfloat16(),
        "codes_m": codes,
        "absmax_m": absmax,
        "codes_v": codes.clone(),
        "absmax_v": absmax.clone(),
        **more,
    }


def copied(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def test_without_triton_it_is_the_definition() -> None:
    theirs, g = tensors_of(COUNT, ema=randn(COUNT, seed=2)), randn(COUNT, seed=3)
    ours = copied(theirs)
    adamw8bit.update(gradient=g, **theirs, **OPTIONS)
    update_triton(gradient=g, **ours, **OPTIONS)
    assert same_bits(theirs, ours)


@pytest.mark.parametrize(("rows", "cols"), [(600, 7), (520, 33), (3, BLOCK), (1, 1)])
def test_outer_products_without_triton(rows: int, cols: int) -> None:
    """More rows than are expanded at a time; the sum in order, by hand."""
    left, right = randn(3, rows, seed=4), randn(3, cols, seed=5)
    g = left[0][:, None] * right[0] + left[1][:, None] * right[1] + left[2][:, None] * right[2]
    theirs = tensors_of(rows * cols, master=randn(rows * cols, seed=6))
    ours = copied(theirs)
    adamw8bit.update(gradient=g.view(-1), **theirs, **OPTIONS)
    weights = ours.pop("weights").view(rows, cols)
    update_outer(weights, left, right, **ours, **OPTIONS)
    assert same_bits(theirs, ours | {"weights": weights.view(-1)})


def test_a_guard_without_triton() -> None:
    tensors, g = tensors_of(COUNT), randn(COUNT, seed=7)
    before = copied(tensors)
    g[5] = torch.inf
    update_triton(gradient=g, **tensors, **OPTIONS, guard=sum_of_squares(g))
    assert same_bits(before, tensors)
    update_triton(gradient=g.nan_to_num(), **tensors, **OPTIONS, guard=torch.tensor(1.0))
    assert not same_bits(before, tensors)


@settings(deadline=None)
@given(count=st.integers(0, 3 * pairwise.CHUNK), offset=st.integers(0, 40))
def test_sum_of_squares_on_another_device_has_the_bits_of_the_host(count: int, offset: int) -> None:
    """By the reference, that runs where there is neither Triton nor the host's memory; in slabs of two chunks."""
    x = randn(count + offset, seed=9)[offset:].mul(5).exp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise, "SLAB", 2 * pairwise.CHUNK)
        assert sum_of_squares_reference(x).item() == host.sum_of_squares(x)
    assert (
        sum_of_squares_reference(x.bfloat16()).item()
        == host.sum_of_squares(x.bfloat16())
        == sum_of_squares(x.bfloat16())
    )


def test_an_empty_run() -> None:
    update_triton(gradient=torch.zeros(0), **tensors_of(0), **OPTIONS)
    assert sum_of_squares(torch.zeros(0)) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_runs_on_fake_tensors(device: str) -> None:
    with FakeTensorMode():
        tensors = {name: tensor.to(device) for name, tensor in tensors_of(COUNT, ema=torch.zeros(COUNT)).items()}
        g = torch.empty(COUNT, device=device)
        update_triton(gradient=g, **tensors, **OPTIONS, guard=sum_of_squares(g))
        weights = tensors.pop("weights").view(1, COUNT)
        update_outer(
            weights, torch.empty(2, 1, device=device), torch.empty(2, COUNT, device=device), **tensors, **OPTIONS
        )


def test_it_compiles_in_one_graph() -> None:
    def step(tensors: dict[str, Any], g: Tensor, at: int) -> None:
        hp = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=at)
        options = OPTIONS | {"hp": hp, "guard": sum_of_squares(g)}
        update_triton(gradient=g, **tensors, **options)

    plain = tensors_of(COUNT, residual=torch.zeros(COUNT, dtype=torch.int8), ema=torch.zeros(COUNT))
    traced, compiled = copied(plain), torch.compile(step, fullgraph=True, backend="aot_eager")
    for at in (1, 2, 3):
        g = randn(COUNT, seed=7 + at)
        step(plain, g, at)
        compiled(traced, g, at)
        assert same_bits(plain, traced)


def test_the_operators_are_registered_as_torch_wants_them() -> None:
    tensors, g = tensors_of(COUNT, ema=torch.zeros(COUNT)), randn(COUNT, seed=8)
    moments = tuple(tensors[name] for name in ("codes_m", "absmax_m", "codes_v", "absmax_v"))
    scalars = (1e-3, 0.9, 0.999, 1e-8, 0.01, 1, -3, 4, 0, 0.9, 0.5)
    given = (tensors["weights"], g, None, None, *moments, None, None, tensors["ema"], None)
    torch.library.opcheck(adamw8bit_triton._step, (*given, *scalars))
    torch.library.opcheck(torch.ops.leapalign.sum_of_squares.default, (g,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.zeros(299)}, r"gradient is torch.float32 \(299,\)"),
        ({"first": 100}, "pass a multiple of 256"),
        ({"seed": -1}, "seed is -1"),
        ({"parameter": 2**32}, "parameter is 4294967296"),
        ({"guard": torch.zeros(1)}, r"guard is torch.float32 \(1,\) on cpu"),
        ({"guard": torch.zeros((), dtype=torch.int64)}, "guard is torch.int64"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {**tensors_of(300), "gradient": torch.zeros(300), **OPTIONS}
    with pytest.raises(ValueError, match=message):
        update_triton(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": torch.zeros(2, 4)}, r"left is torch.float32 \(2, 4\)"),
        ({"right": torch.zeros(3, 100)}, r"right is torch.float32 \(3, 100\)"),
        ({"right": torch.zeros(100, 2).T}, r"right is"),
        ({"left": torch.zeros(2, 3, dtype=torch.float64)}, "left is torch.float64"),
        ({"weights": torch.zeros(100, 3).bfloat16().T}, "weights have strides"),
        ({"codes_m": torch.zeros(299, dtype=torch.uint8)}, "codes_m is"),
    ],
)
def test_wrong_factors_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {**tensors_of(300), "left": torch.zeros(2, 3), "right": torch.zeros(2, 100), **OPTIONS}
    arguments["weights"] = arguments["weights"].view(3, 100)
    with pytest.raises(ValueError, match=message):
        update_outer(**{**arguments, **change})
    with pytest.raises(ValueError, match="reads contiguous"):
        sum_of_squares(torch.zeros(3, dtype=torch.float64))
