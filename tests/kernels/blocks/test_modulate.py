"""The modulation operators as contracts: the plain code's values, autograd, fake tensors, torch.compile, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.kernels.blocks import gated, gated_modulate, modulate, rows
from leapalign.kernels.blocks.gated import gated_residual
from leapalign.kernels.blocks.gated_modulate import gated_residual_modulate
from leapalign.kernels.blocks.modulate import layer_norm_modulate

ROOT = Path(__file__).parents[3]
SHAPE = (2, 5, 12)
EPS = 1e-6


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs_of(function: Callable[..., Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Leaves in the order of the function's arguments."""
    batch, _, features = SHAPE
    row, vector = [
        [randn(*shape, seed=seed, dtype=dtype) for seed in (1, 2, 3)] for shape in (SHAPE, (batch, features))
    ]
    arguments = {
        layer_norm_modulate: [row[0], *vector[:2]],
        gated_residual: [row[0], vector[0], row[1]],
        gated_residual_modulate: [row[0], vector[0], row[1], *vector[1:]],
    }[function]
    return [tensor.requires_grad_() for tensor in arguments]


FUNCTIONS = pytest.mark.parametrize(
    "function", [layer_norm_modulate, gated_residual, gated_residual_modulate], ids=lambda f: f.__name__
)


def tuple_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


@pytest.mark.skipif(rows.triton is None, reason="there is no Triton here")
def test_the_kernels_under_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    checks = Path(__file__).parents[1] / "interpreted" / "check_modulate.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_triton_the_references_run() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from leapalign.kernels.blocks import gated, gated_modulate, modulate, rows\n"
        "x, v = torch.ones(1, 2, 3), torch.ones(1, 3)\n"
        "assert torch.equal(modulate.layer_norm_modulate(x, v, v), x)\n"
        "assert torch.equal(gated_modulate.gated_residual_modulate(x, v, x, v, v)[0], x + x)\n"
        "assert not [c for file in (gated, gated_modulate, modulate, rows) for c in file.compilations()]\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_it_is_the_norm_of_diffusers() -> None:
    """AdaLayerNormZero's output from its own vectors. The variance is computed another way: 1e-12 in float64."""
    norm = AdaLayerNormZero(8).double()
    x, emb = randn(2, 5, 8, seed=1), randn(2, 8, seed=2)
    expected, *_ = norm(x, emb=emb)
    shift, scale, *_ = norm.linear(norm.silu(emb)).chunk(6, dim=1)
    torch.testing.assert_close(layer_norm_modulate(x, shift, scale, EPS), expected, rtol=1e-12, atol=1e-12)


def test_the_fused_operator_is_the_two_in_turn() -> None:
    x, gate, y, shift, scale = inputs_of(gated_residual_modulate, torch.bfloat16)
    h, m = gated_residual_modulate(x, gate, y, shift, scale, EPS)
    apart = gated_residual(x, gate, y)
    assert torch.equal(h, apart)
    assert torch.equal(m, layer_norm_modulate(apart, shift, scale, EPS))


@FUNCTIONS
def test_gradients(function: Callable[..., Any]) -> None:
    """Central differences in float64: an error of 1e-6 by gradcheck's own step."""
    assert torch.autograd.gradcheck(function, inputs_of(function))


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_the_rules_of_torch(function: Callable[..., Any], dtype: torch.dtype) -> None:
    inputs = inputs_of(function, dtype)
    row, vector = randn(*SHAPE, dtype=dtype), randn(SHAPE[0], SHAPE[2], dtype=dtype)
    _, statistics = modulate.reference(row, vector, vector, EPS)
    if function is layer_norm_modulate:
        torch.library.opcheck(modulate._operator, (*inputs, EPS))
        torch.library.opcheck(modulate._gradients, (row, row, vector, statistics))
    elif function is gated_residual:
        torch.library.opcheck(gated._operator, tuple(inputs))
        torch.library.opcheck(gated._gradients, (row, vector, row))
    else:
        torch.library.opcheck(gated_modulate._operator, (*inputs, EPS))
        torch.library.opcheck(gated_modulate._gradients, (row, row, row, row, vector, vector, statistics))


@FUNCTIONS
def test_under_fake_tensors(function: Callable[..., Any]) -> None:
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(tensor.detach()).requires_grad_() for tensor in inputs_of(function, torch.bfloat16)]
        outputs = tuple_of(function(*inputs))
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    for output in outputs:
        assert output.shape == SHAPE and output.dtype == torch.bfloat16
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape and tensor.grad.dtype == torch.bfloat16


@FUNCTIONS
def test_under_compile(function: Callable[..., Any]) -> None:
    """One graph, and the bits of the eager operator."""
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = inputs_of(function, torch.float32)
        outputs = tuple_of(run(*inputs))
        torch.autograd.backward(outputs, [randn(*SHAPE, seed=7, dtype=torch.float32) for _ in outputs])
        results.append([*outputs, *(tensor.grad for tensor in inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_only_one_of_two_outputs_has_a_gradient() -> None:
    """What no loss depends on counts as zero."""
    for chosen in (0, 1):
        ours, plain = inputs_of(gated_residual_modulate), inputs_of(gated_residual_modulate)
        gated_residual_modulate(ours[0], ours[1], ours[2], ours[3], ours[4])[chosen].square().sum().backward()
        h = plain[0] + plain[1][:, None] * plain[2]
        m = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + plain[4][:, None]) + plain[3][:, None]
        (h, m)[chosen].square().sum().backward()
        for one, other in zip(ours, plain, strict=True):
            expected = torch.zeros_like(other) if other.grad is None else other.grad
            torch.testing.assert_close(one.grad, expected, rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_named() -> None:
    x, vector = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"x is torch.float32 \(3, 4\); it has the shape"):
        layer_norm_modulate(x[0], vector, vector)
    with pytest.raises(ValueError, match=r"scale is torch.float32 \(4,\) on cpu; .* pass torch.float32 \(2, 4\)"):
        layer_norm_modulate(x, vector, vector[0])
    with pytest.raises(ValueError, match=r"gate is torch.bfloat16 \(2, 4\) on cpu"):
        gated_residual(x, vector.bfloat16(), x)
    with pytest.raises(ValueError, match=r"y is torch.float32 \(2, 1, 4\) on cpu"):
        gated_residual_modulate(x, vector, x[:, :1], vector, vector)
