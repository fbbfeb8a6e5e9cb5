"""The fused leaps: the kernels against float64 under the interpreter, the custom ops in every mode of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.executors import reference
from leapalign.kernels.leap import prediction as module
from leapalign.kernels.leap.prediction import leap_distances, similarity_weights
from tests.kernels.interpreter import run_interpreted

leap: Any = module.leap  # Any: they are called with unpacked tuples
leap_distance: Any = module.leap_distance


def inputs(dtype: torch.dtype = torch.float32, batch: int = 3) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(x_k, v_k, x_j, v_j, x_0), k, j."""
    generator = torch.Generator().manual_seed(3)
    tensors = torch.randn(5, batch, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    return tuple(tensors.unbind()), torch.linspace(1.0, 0.5, batch), torch.linspace(0.4, 0.1, batch)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton, which is there on Linux")
    run_interpreted("check_leap")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_has_the_bits_of_the_oracle(dtype: torch.dtype) -> None:
    (x_k, v_k, x_j, v_j, x_0), k, j = inputs(dtype)
    k, j = k.to(dtype), j.to(dtype)
    found = leap(x_k, v_k, x_j, v_j, x_0, k, j, 0.1)
    x_jk, x_0j = reference.leap(x_k, k - j, v_k), reference.leap(x_j, j, v_j)
    d_j, d_0 = reference.distance(x_j, x_jk), reference.distance(x_0, x_0j)
    weights = reference.similarity_weights(d_j, d_0, 0.1)
    for value, expected in zip(found, (x_jk, x_0j, d_j, d_0, weights), strict=True):
        assert torch.equal(value, expected)
    for value, expected in zip(leap_distances(x_k, v_k, x_j, v_j, x_0, k, j, 0.1), found[2:], strict=True):
        assert torch.equal(value, expected)
    assert torch.equal(leap_distance(x_j, v_j, x_0, j, torch.zeros_like(j)), d_0)
    assert torch.equal(similarity_weights(d_j, d_0, 0.1), weights)


def test_gradcheck() -> None:
    """Finite differences in float64, of both predictions in everything that they are differentiable in."""
    (x_k, v_k, x_j, v_j, x_0), k, j = inputs(torch.float64)
    leaves = [x.clone().requires_grad_() for x in (x_k, v_k, x_j, v_j)]
    assert torch.autograd.gradcheck(lambda *given: leap(*given, x_0, k, j, 0.1)[:2], leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [0, 3])
def test_operators_keep_torchs_rules(dtype: torch.dtype, batch: int) -> None:
    tensors, k, j = inputs(dtype, batch)
    leaves = [x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.leapalign.leap.default, (*leaves, k, j, 0.1, True))
    torch.library.opcheck(torch.ops.leapalign.leap.default, (*tensors, k, j, 0.1, False))
    torch.library.opcheck(torch.ops.leapalign.leap_distance.default, (*tensors[:3], k, j))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 4096, 64, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(2)
        found = leap(x, x, x, x, x, k, k, 0.1)
        assert [value.dtype for value in found] == [torch.bfloat16] * 2 + [torch.float32] * 3
        assert found.x_jk.shape == x.shape and found.weights.shape == (2,)
        (dx,) = torch.autograd.grad(found.x_jk.sum() + found.x_0j.sum(), x)
        assert dx.shape == x.shape and dx.dtype == x.dtype


def test_compiled() -> None:
    """One graph, and the gradients of eager mode."""
    tensors, k, j = inputs()

    def loss(x_k: Tensor, v_k: Tensor) -> Tensor:
        found = leap(x_k, v_k, *tensors[2:], k, j, 0.1)
        return (found.weights[:, None, None] * found.x_jk.square() + found.x_0j).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors[:2]]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_refusals() -> None:
    tensors, k, j = inputs()
    with pytest.raises(ValueError, match=r"\(2,\).*one shape \(B, ...\) and noise levels \(B,\)"):
        leap(*tensors, k, j[:2], 0.1)
    with pytest.raises(ValueError, match="one shape"):
        leap_distance(tensors[0], tensors[1][:, 1:], tensors[2], k, j)
    with pytest.raises(ValueError, match="no elements a sample"):
        leap_distance(*(torch.empty(3, 0) for _ in range(3)), k, j)


def test_compilations_name_every_argument() -> None:
    pytest.importorskip("triton", reason="needs triton, which is there on Linux")
    listed = list(module.compilations())
    assert len({compilation.name for compilation in listed}) == len(listed)
    for compilation in listed:
        assert set(compilation.signature) == set(compilation.kernel.arg_names), compilation.name
        constant = {name for name, kind in compilation.signature.items() if kind == "constexpr"}
        assert constant == set(compilation.constants) and not constant & set(compilation.aligned), compilation.name
