"""Vector-Jacobian products: closed forms, accumulation, microbatches, and what must be left alone."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leapalign.engine.passes.vjp import velocity_vjp

SIGMA = torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64)


def linear_case(linear_flow: Any) -> tuple[Any, Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, cotangent = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    return linear_flow(), latents, {"pooled_projections": torch.ones(3, 4, dtype=torch.float64)}, cotangent


@pytest.mark.parametrize("microbatch", [None, 1, 2])
def test_closed_form(linear_flow: Any, microbatch: int | None) -> None:
    """v = x A^T + sigma b + p: (dv/dx)^T c = c A, (dv/dA)^T c = sum c^T x, (dv/db)^T c = sum sigma c."""
    model, x, given, c = linear_case(linear_flow)
    grads: dict[str, Tensor] = {}
    u = velocity_vjp(model, x, SIGMA, given, c, grads=grads, input_grad=True, microbatch=microbatch)
    torch.testing.assert_close(u, c @ model.a.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads["a"], torch.einsum("bsi,bsj->ij", c, x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads["b"], torch.einsum("b,bsi->i", SIGMA, c), rtol=1e-13, atol=1e-13)
    assert torch.equal(grads["unused"], torch.zeros(2, dtype=torch.float64))
    assert u is not None
    assert not u.requires_grad
    assert not any(gradient.requires_grad for gradient in grads.values())


def test_it_adds_to_what_is_there(linear_flow: Any) -> None:
    model, x, given, c = linear_case(linear_flow)
    once: dict[str, Tensor] = {}
    velocity_vjp(model, x, SIGMA, given, c, grads=once, input_grad=False)
    twice = {"a": once["a"].clone()}
    kept = twice["a"]
    assert velocity_vjp(model, x, SIGMA, given, c, grads=twice, input_grad=False) is None
    assert twice["a"] is kept
    torch.testing.assert_close(twice["a"], 2 * once["a"], rtol=1e-15, atol=0)
    assert torch.equal(twice["b"], once["b"])


def test_input_gradient_alone(linear_flow: Any) -> None:
    model, x, given, c = linear_case(linear_flow)
    u = velocity_vjp(model, x, SIGMA, given, c, grads=None, input_grad=True)
    torch.testing.assert_close(u, c @ model.a.detach(), rtol=1e-13, atol=1e-13)
    assert velocity_vjp(model, x, SIGMA, given, c, grads=None, input_grad=False) is None


@pytest.mark.parametrize("family", ["flux", "flux-guidance", "sd3"])
@pytest.mark.parametrize("microbatch", [1, 2])
def test_microbatches_sum_to_the_batch(
    family: str, microbatch: int, make_transformer: Any, make_inputs: Any, worst_error: Any, float64_throughout: None
) -> None:
    transformer = make_transformer(family, torch.float64)
    latents, conditioning = make_inputs(family, 3, torch.float64)
    c = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole: dict[str, Tensor] = {}
    split: dict[str, Tensor] = {}
    u = velocity_vjp(transformer, latents, SIGMA, conditioning, c, grads=whole, input_grad=True)
    split_u = velocity_vjp(
        transformer, latents, SIGMA, conditioning, c, grads=split, input_grad=True, microbatch=microbatch
    )
    assert worst_error({**split, "input": split_u}, {**whole, "input": u}) <= (1, "")


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_gradient_checkpointing_changes_nothing(family: str, make_transformer: Any, make_inputs: Any) -> None:
    latents, conditioning = make_inputs(family, 2)
    results = []
    for checkpointing in (False, True):
        transformer = make_transformer(family)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        grads: dict[str, Tensor] = {}
        u = velocity_vjp(transformer, latents, SIGMA[:2].float(), conditioning, latents, grads=grads, input_grad=True)
        assert u is not None
        results.append({**grads, "input": u})
    for name, gradient in results[0].items():  # the same operations on the same values: the same bits
        assert torch.equal(results[1][name], gradient), name


def test_what_must_be_left_alone(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux")
    latents, conditioning = make_inputs("flux", 2)
    transformer.x_embedder.requires_grad_(False)
    marker = torch.full_like(transformer.proj_out.bias, 7.0)
    transformer.proj_out.bias.grad = marker.clone()
    transformer.train()
    flags = {name: parameter.requires_grad for name, parameter in transformer.named_parameters()}
    grads: dict[str, Tensor] = {}
    with torch.no_grad():  # the caller's mode does not matter
        velocity_vjp(transformer, latents, SIGMA[:2].float(), conditioning, latents, grads=grads, input_grad=True)
    assert grads.keys() == {name for name, trained in flags.items() if trained}
    assert {name: parameter.requires_grad for name, parameter in transformer.named_parameters()} == flags
    assert all(module.training for module in transformer.modules())
    assert torch.equal(transformer.proj_out.bias.grad, marker)
    others = [p.grad for name, p in transformer.named_parameters() if name != "proj_out.bias"]
    assert all(gradient is None for gradient in others)
    assert not latents.requires_grad


def test_bfloat16_parameters_have_float32_gradients(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux", torch.bfloat16)
    latents, conditioning = make_inputs("flux", 2)
    given = {name: value.to(torch.bfloat16) for name, value in conditioning.items()}
    grads: dict[str, Tensor] = {}
    u = velocity_vjp(transformer, latents, SIGMA[:2].float(), given, latents, grads=grads, input_grad=True)
    assert u is not None
    assert u.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in grads.values())


class Aliased(nn.Module):
    """v = x + p + q: autograd hands out one tensor as the gradient of both parameters."""

    timestep_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (hidden_states + (self.p + self.q),)


def test_gradients_that_autograd_shares_are_kept_apart() -> None:
    c = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    grads: dict[str, Tensor] = {}
    for _ in range(2):
        velocity_vjp(Aliased(), torch.zeros(2, 3), SIGMA[:2].float(), {}, c, grads=grads, input_grad=False)
    assert torch.equal(grads["p"], 2 * c)
    assert torch.equal(grads["q"], 2 * c)


class Saved:
    """A tensor that some graph keeps for its backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size, self.storage = tensor, tensor.numel(), tensor.untyped_storage().data_ptr()


def test_one_microbatchs_graph_lives_at_a_time(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux")
    latents, conditioning = make_inputs("flux", 3)
    living: weakref.WeakSet[Saved] = weakref.WeakSet()
    at_start: list[int] = []
    peak = 0
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}

    def pack(tensor: Tensor) -> Saved:
        nonlocal peak
        saved = Saved(tensor)
        living.add(saved)
        peak = max(peak, sum(s.size for s in living if s.storage not in weights))
        return saved

    transformer.register_forward_pre_hook(lambda *_: at_start.append(len(living)))
    peaks = []
    for microbatch in (None, 1):
        peak = 0
        grads: dict[str, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            velocity_vjp(
                transformer, latents, SIGMA.float(), conditioning, latents, grads=grads, input_grad=True,
                microbatch=microbatch,
            )  # fmt: skip
        peaks.append(peak)
        assert len(living) == 0
    assert at_start == [0] * 4  # one call for the batch, three for its rows
    assert peaks[1] < 0.6 * peaks[0]  # a third of the activations, and the position tables, which are shared
