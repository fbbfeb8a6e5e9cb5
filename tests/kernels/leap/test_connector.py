"""The surrogate as autograd nodes: Algorithm 1 written with them has the gradients of Algorithm 1 written literally.

Their kernels run under the interpreter in tests/kernels/leap/test_cotangents.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign import LeapAlign
from leapalign.engine.backbones.velocity import velocity
from leapalign.engine.passes.vjp import trainable
from leapalign.executors.reference import reference_gradients
from leapalign.kernels.leap.connector import discount, leap_connector
from leapalign.kernels.leap.prediction import similarity_weights
from leapalign.method.reward_gradient import hinge
from leapalign.method.trajectory import rollout

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.25, 0.0], dtype=torch.float64)
PAIRS = torch.tensor([[0, 2], [1, 4], [3, 4]])


def reward(latents: Tensor) -> Tensor:
    """Nonlinear, different for every sample."""
    offsets = torch.tensor([0.0, 1.0, 0.2])  # the second sample is above a threshold of 0.5
    mixed = latents * latents.roll(1, dims=1) + latents
    return offsets.to(latents) + 0.1 * torch.tanh(mixed.flatten(1).mean(1))


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("fused", [True, False], ids=["one-node", "discount-apart"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_algorithm_1(
    dtype: torch.dtype, alpha: float, fused: bool, make_transformer: Any, make_inputs: Any, worst_error: Any
) -> None:
    transformer = make_transformer("flux", dtype)
    noise, conditioning = make_inputs("flux", 3, dtype)
    method = LeapAlign(alpha=alpha, threshold=0.5)
    trajectory = rollout(transformer, conditioning, noise, SIGMAS, keep=PAIRS)
    expected = reference_gradients(transformer, conditioning, trajectory, reward, method, PAIRS, {})

    step_k, step_j = PAIRS.unbind(1)
    k, j = trajectory.sigmas[step_k], trajectory.sigmas[step_j]
    x_k, real_j, real_0 = trajectory.at(step_k), trajectory.at(step_j), trajectory.final
    v_k = velocity(transformer, x_k, k, conditioning)
    x_j, model_input, d_j = leap_connector(x_k, v_k, real_j, k, j, alpha)
    given = model_input if fused else discount(x_j, alpha)
    x_0, _, d_0 = leap_connector(x_j, velocity(transformer, given, j, conditioning), real_0, j, torch.zeros_like(j))
    assert torch.equal(x_j, real_j) and torch.equal(given, real_j) and torch.equal(x_0, real_0)
    weights = similarity_weights(d_j, d_0, method.tau)
    loss = hinge(reward(x_0), weights, method.threshold).mean()
    parameters = trainable(transformer)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)

    error, name = worst_error(dict(zip(parameters, found, strict=True)), expected.grads)
    assert error <= 1, f"{name}: {error:.2g} times the tolerance"
    assert any(gradient.any() for gradient in found)
    few_ulps = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.detach(), expected.loss, rtol=few_ulps, atol=few_ulps)
    for value, same in ((d_j, expected.d_j), (d_0, expected.d_0), (weights, expected.weights)):
        torch.testing.assert_close(value, same, rtol=few_ulps, atol=few_ulps)


def chain(a: Tensor, x_k: Tensor, x_j: Tensor, x_0: Tensor, k: Tensor, j: Tensor) -> Tensor:
    """Both leaps through the velocity x a."""
    latents, model_input, d_j = leap_connector(x_k, x_k @ a, x_j, k, j, 0.3)
    final, _, d_0 = leap_connector(latents, model_input @ a, x_0, j, torch.zeros_like(j))
    return (similarity_weights(d_j, d_0, 0.1) * discount(final, 0.5).square().flatten(1).mean(1)).mean()


def test_fake_tensors_and_compiled() -> None:
    generator = torch.Generator().manual_seed(6)
    x_k, x_j, x_0 = torch.randn(3, 3, 5, 7, generator=generator).unbind()
    k, j = torch.tensor([1.0, 0.7, 0.5]), torch.tensor([0.5, 0.2, 0.1])
    a = torch.randn(7, 7, generator=generator, requires_grad=True)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(function(a, x_k, x_j, x_0, k, j), a)[0] for function in (chain, compiled)]
    assert torch.equal(*gradients)
    with FakeTensorMode(allow_non_fake_inputs=False):
        x, level, weight = torch.empty(3, 5, 7), torch.empty(3), torch.empty(7, 7, requires_grad=True)
        (gradient,) = torch.autograd.grad(chain(weight, x, x, x, level, level), weight)
        assert gradient.shape == (7, 7)


def test_only_one_way_out() -> None:
    """A gradient at the model's input alone is discounted; one at neither leaves nothing."""
    x, v = torch.ones(2, 2, 4, dtype=torch.float64).unbind()
    leaves = x.clone().requires_grad_(), v.clone().requires_grad_()
    k, j = torch.tensor([1.0, 0.5], dtype=torch.float64), torch.tensor([0.5, 0.25], dtype=torch.float64)
    found = leap_connector(*leaves, torch.zeros(2, 4, dtype=torch.float64), k, j, 0.25)
    dx, dv = torch.autograd.grad(found.model_input, leaves, torch.ones_like(found.model_input))
    assert torch.equal(dx, torch.full_like(dx, 0.25))
    assert torch.equal(dv, -0.25 * (k - j)[:, None].expand_as(dv))
    assert not found.distance.requires_grad
