"""q and k normalised and turned, as contracts: diffusers' values, autograd, fake tensors, torch.compile, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.kernels.blocks import heads
from leapalign.kernels.blocks.qk_norm_rope import compilations, qk_norm_rope
from tests.kernels.interpreted.check_qk_norm_rope import (  # noqa: F401 - the same contracts for the reference
    CASED,
    CASES,
    EPS,
    Case,
    Inputs,
    U,
    make,
    rotate,
    rows,
    test_heads_of_extreme_sizes,
    test_no_eps,
    test_q_and_k_of_other_strides_and_unequal_ones,
    test_the_same_bits,
    test_values_and_gradients,
    test_what_is_not_finite_stays_in_its_head,
)
from tests.kernels.interpreter import run_interpreted

ROOT = Path(__file__).parents[3]
HALF_ULP = 2.0**-8  # of bfloat16
SMALL = Case((2, 3, 2, 8), first=1)


def test_the_kernels_under_the_interpreter() -> None:
    if heads.triton is None:
        pytest.skip("there is no Triton for this platform")
    run_interpreted("check_qk_norm_rope")


def test_without_triton_the_reference_runs() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from leapalign.kernels.blocks.qk_norm_rope import compilations, qk_norm_rope\n"
        "x = torch.ones(1, 2, 3, 4)\n"
        "assert torch.equal(qk_norm_rope(x, x, x[0, 0, 0], None, None, None, 0.0)[0], x)\n"
        "assert not list(compilations())\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def magnitudes(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (z * rows(cos, z, 0)).abs() + (rotate(z) * rows(sin, z, 0)).abs()


def test_it_is_the_attention_of_flux() -> None:
    """Text and image tokens with norms of their own, joined, then turned, as FluxAttnProcessor has it, in bf16.

    It rounds z and then y, we round y: u (|z c| + |R(z) s|) + 2 u |y| with u = 2^-8, and each side's float32
    arithmetic, (D / 2 + 9) 2^-24 of the first magnitude (check_qk_norm_rope.py); 1% more for the second order.
    """
    tokens, dim, text = (3, 7), 16, 3
    parts = [make(Case((2, count, 2, dim)), torch.bfloat16) for count in tokens]
    norms = [nn.RMSNorm(dim, eps=EPS, dtype=torch.bfloat16) for _ in parts]
    for norm, part in zip(norms, parts, strict=True):
        norm.weight.data.copy_(part.weight_q)  # type: ignore[arg-type]
    ids = torch.randint(0, 64, (sum(tokens), 3), generator=torch.Generator().manual_seed(0))
    cos, sin = FluxPosEmbed(theta=10000, axes_dim=[4, 6, 6])(ids)
    z = torch.cat([norm(part.q) for norm, part in zip(norms, parts, strict=True)], dim=1)
    theirs = apply_rotary_emb(z, (cos, sin), sequence_dim=1).double()
    ours = torch.cat(
        [
            qk_norm_rope(part.q, part.k, part.weight_q, part.weight_k, cos, sin, EPS, first)[0]
            for part, first in zip(parts, (0, text), strict=True)
        ],
        dim=1,
    ).double()
    a = magnitudes(z.double(), cos.double(), sin.double())
    bound = HALF_ULP * (a + 2 * ours.abs()) + 2 * (dim / 2 + 9) * U * a
    assert ((ours - theirs).abs() <= 1.01 * bound).all()


def test_it_is_the_norm_of_sd3() -> None:
    """diffusers' own RMSNorm rounds n and then z, we round z: 3 u |z|, and the float32 arithmetic as above."""
    q, k, weight, *_ = make(Case((1, 4, 3, 16), turned=False), torch.bfloat16)
    norm = RMSNorm(16, eps=EPS).to(torch.bfloat16)
    norm.weight.data.copy_(weight)
    theirs = norm(q.transpose(1, 2)).transpose(1, 2).double()
    ours = qk_norm_rope(q, k, weight, weight, None, None, EPS)[0].double()
    assert ((ours - theirs).abs() <= 1.01 * (3 * HALF_ULP + 2 * (16 / 2 + 9) * U) * ours.abs()).all()


@pytest.mark.parametrize("case", [SMALL, *CASES[4:7]], ids=str)
def test_gradients(case: Case) -> None:
    """Central differences in float64, to gradcheck's own 1e-5 and 1e-3."""
    leaves = make(case, torch.float64).leaves()
    given = [x for x in leaves[:4] if x is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        parts = iter(tensors)
        arguments = [None if x is None else next(parts) for x in leaves[:4]]
        return qk_norm_rope(*Inputs(*arguments, leaves.cos, leaves.sin), EPS, case.first)  # type: ignore[arg-type,call-arg]

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("case", [SMALL, CASES[4]], ids=str)
def test_the_operators_keep_the_rules_of_torch(case: Case) -> None:
    leaves = make(case, torch.bfloat16).leaves()
    torch.library.opcheck(torch.ops.leapalign.qk_norm_rope.default, (*leaves, EPS, case.first))
    detached = [None if x is None else x.detach() for x in leaves]
    for wanted in (True, False):
        arguments = (*detached[:2], *detached, EPS, case.first, wanted)
        torch.library.opcheck(torch.ops.leapalign.qk_norm_rope_backward.default, arguments)


@CASED
def test_under_fake_tensors(case: Case) -> None:
    with FakeTensorMode() as mode:
        leaves = make(case, torch.bfloat16)
        assert isinstance(leaves.q, torch._subclasses.FakeTensor) and leaves.q.fake_mode is mode
        leaves = leaves.leaves()
        outputs = qk_norm_rope(*leaves, EPS, case.first)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    for x, y in zip(leaves[:2], outputs, strict=True):
        assert y.shape == case.shape and y.dtype == torch.bfloat16 and y.is_contiguous()
        assert x is not None and x.grad is not None and x.grad.is_contiguous() and x.grad.dtype == torch.bfloat16
    for weight in leaves[2:4]:
        assert weight is None or (weight.grad is not None and weight.grad.shape == weight.shape)


@pytest.mark.parametrize("case", [SMALL, CASES[5]], ids=str)
def test_under_compile(case: Case) -> None:
    """One graph, and the bits of the eager operator."""
    results = []
    for function in (qk_norm_rope, torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")):
        leaves = make(case, torch.float32).leaves()
        outputs = function(*leaves, EPS, case.first)
        torch.autograd.backward(outputs, [y.detach() + 1 for y in outputs])
        results.append([*outputs, *(x.grad for x in leaves[:4] if x is not None)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    """One output in the loss, the weights frozen; the other side's gradient is zero."""
    leaves = make(SMALL, torch.float32).leaves()
    for weight in leaves[2:4]:
        weight.requires_grad_(False)  # type: ignore[union-attr]
    qk_norm_rope(*leaves, EPS, SMALL.first)[1].square().sum().backward()
    assert leaves.k.grad is not None and leaves.k.grad.any()
    assert leaves.q.grad is not None and not leaves.q.grad.any()
    assert all(x is not None and x.grad is None for x in leaves[2:])


def test_a_rotation_saves_no_activations() -> None:
    saved: list[Tensor] = []
    leaves = make(Case((1, 2, 3, 8), normalised=(False, True)), torch.float32).leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        qk_norm_rope(*leaves, EPS)
    held = {x.data_ptr() for x in saved}
    assert leaves.k.data_ptr() in held and leaves.q.data_ptr() not in held


def test_the_outputs_are_new() -> None:
    """Also where there is nothing to do."""
    q, k, *_ = make(Case((1, 2, 3, 8)), torch.float32)
    out = qk_norm_rope(q, k, None, None, None, None, EPS)
    assert torch.equal(out[0], q) and torch.equal(out[1], k)
    assert {x.untyped_storage().data_ptr() for x in out}.isdisjoint({q.untyped_storage().data_ptr()})


def test_what_does_not_fit_is_named() -> None:
    q, k, weight, _, cos, sin = make(Case((1, 2, 3, 8)), torch.float32)
    with pytest.raises(ValueError, match=r"k torch.bfloat16 \(1, 2, 3, 8\) on cpu: give both as"):
        qk_norm_rope(q, k.bfloat16(), weight, weight, cos, sin, EPS)
    with pytest.raises(ValueError, match=r"weight_k is \(4,\) on cpu; heads of 8 on cpu have \(8,\) there"):
        qk_norm_rope(q, k, weight, weight[:4], cos, sin, EPS)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"cos and sin are \(5, 8\) and None; .*: give both or neither"):
        qk_norm_rope(q, k, weight, weight, cos, None, EPS)
    with pytest.raises(ValueError, match="first=4 and 2 tokens, but cos and sin have 5 rows"):
        qk_norm_rope(q, k, weight, weight, cos, sin, EPS, first=4)


def test_what_is_compiled() -> None:
    """Both directions, with and without the weights' gradients, of two models in two dtypes; every argument named."""
    if heads.triton is None:
        pytest.skip("there is no Triton for this platform")
    found = list(compilations())
    assert len(found) == len({entry.name for entry in found}) == 16
    for entry in found:
        assert set(entry.signature) == set(entry.kernel.arg_names)
        assert {name for name, kind in entry.signature.items() if kind == "constexpr"} == set(entry.constants)
        assert not set(entry.aligned) & set(entry.constants)
