"""The fused cotangents: the kernel against float64 under the interpreter, the custom op in every mode of torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.kernels.leap import cotangents as module
from leapalign.kernels.leap.cotangents import cotangent_and_carry, cotangent_j, cotangent_k, cotangents
from tests.kernels.interpreter import run_interpreted


def inputs(dtype: torch.dtype = torch.float32, batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, u, k, j."""
    g, u = torch.randn(2, batch, 5, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    return g, u, torch.linspace(1.0, 0.5, batch), torch.linspace(0.4, 0.1, batch)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton, which is there on Linux")
    run_interpreted("check_cotangents")


def test_sample_by_sample() -> None:
    """Signs, factors and the order of the levels: c_j = -j g, y = g + alpha u, c_k = -(k - j) y."""
    g, u, k, j = inputs(torch.float64)
    c_j, c_k = cotangents(g, u, 0.3, k, j)
    same, y = cotangent_and_carry(g, u, 0.3, k, j)
    for b in range(3):
        level, width = j[b].double(), k[b].double() - j[b].double()
        torch.testing.assert_close(c_j[b], -level * g[b], rtol=1e-15, atol=0)
        torch.testing.assert_close(y[b], g[b] + 0.3 * u[b], rtol=1e-15, atol=0)
        torch.testing.assert_close(c_k[b], -width * (g[b] + 0.3 * u[b]), rtol=1e-6, atol=0)  # k - j in float32
    assert torch.equal(same, c_k) and torch.equal(cotangent_k(g, u, 0.3, k, j), c_k)
    assert torch.equal(cotangent_j(g, j), c_j)
    independent = cotangents(g, None, 0.3, k, j)
    assert torch.equal(independent[1], cotangents(g, u, 0.0, k, j)[1])


def test_results_are_new_constants_in_the_dtype_asked_for() -> None:
    g, u, k, j = inputs()
    leaf = g.clone().requires_grad_()
    c_j, c_k = cotangents(leaf, u, 0.3, k, j, dtype=torch.bfloat16)
    assert c_j.dtype == c_k.dtype == torch.bfloat16 and not c_j.requires_grad and not c_k.requires_grad
    _, y = cotangent_and_carry(g, None, 0.3, k, j)
    assert torch.equal(y, g) and y.data_ptr() != g.data_ptr()


@pytest.mark.parametrize("batch", [0, 3])
def test_operator_keeps_torchs_rules(batch: int) -> None:
    g, u, k, j = inputs(batch=batch)
    for nested, level, first, carry in ((u, k, True, True), (None, k, False, True), (None, None, True, False)):
        given = (g, nested, 0.3, level, j, torch.bfloat16, first, carry)
        torch.library.opcheck(torch.ops.leapalign.cotangents.default, given)


def test_fake_tensors_and_compiled() -> None:
    with FakeTensorMode():
        g, k = torch.empty(2, 4096, 64), torch.empty(2)
        c_j, c_k = cotangents(g, g, 0.3, k, k, dtype=torch.bfloat16)
        assert c_j.shape == c_k.shape == g.shape and c_j.dtype == c_k.dtype == torch.bfloat16
    given = inputs()

    def both(g: Tensor, u: Tensor, k: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        return cotangents(g, u, 0.3, k, j, dtype=torch.bfloat16)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for value, expected in zip(compiled(*given), both(*given), strict=True):
        assert torch.equal(value, expected)


def test_refusals() -> None:
    g, u, k, j = inputs()
    with pytest.raises(ValueError, match="give g and u of one shape"):
        cotangents(g, u[:, 1:], 0.3, k, j)
    with pytest.raises(ValueError, match="levels"):
        cotangent_j(g, j[:1])


def test_compilations_name_every_argument() -> None:
    pytest.importorskip("triton", reason="needs triton, which is there on Linux")
    listed = list(module.compilations())
    assert len({compilation.name for compilation in listed}) == len(listed)
    for compilation in listed:
        assert set(compilation.signature) == set(compilation.kernel.arg_names), compilation.name
        constant = {name for name, kind in compilation.signature.items() if kind == "constexpr"}
        assert constant == set(compilation.constants) and not constant & set(compilation.aligned), compilation.name
