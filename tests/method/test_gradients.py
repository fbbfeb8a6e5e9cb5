"""The decoupled executor against Algorithm 1 written literally, against closed forms, and trap by trap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign import LeapAlign, alignment_gradients
from leapalign.method.reward_gradient import reward_gradient
from leapalign.method.trajectory import rollout
from tests.method.problems import OFFSETS, SIGMAS, bounded_reward, linear_problem

PAIRS = {"mixed": [[0, 2], [1, 4], [3, 4]], "adjacent": [[0, 1], [2, 3], [3, 4]], "extreme": [[0, 4], [0, 4], [0, 4]]}


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("batch", "threshold"), [(3, 10.0), (3, 0.5), (1, 0.5)], ids=["all", "some", "one"])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("family", ["flux", "flux-guidance", "sd3"])
def test_decoupled_equals_the_literal_algorithm_in_float64(
    family: str, alpha: float, pairs: str, batch: int, threshold: float,
    make_transformer: Any, make_inputs: Any, worst_error: Any,
) -> None:  # fmt: skip
    compare_executors(torch.float64, family, alpha, pairs, batch, threshold, make_transformer, make_inputs, worst_error)


@pytest.mark.parametrize(("batch", "threshold"), [(3, 0.5), (1, 0.5)], ids=["some", "one"])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("family", ["flux", "flux-guidance", "sd3"])
def test_decoupled_equals_the_literal_algorithm_in_float32(
    family: str, alpha: float, pairs: str, batch: int, threshold: float,
    make_transformer: Any, make_inputs: Any, worst_error: Any,
) -> None:  # fmt: skip
    compare_executors(torch.float32, family, alpha, pairs, batch, threshold, make_transformer, make_inputs, worst_error)


def compare_executors(
    dtype: torch.dtype, family: str, alpha: float, pairs: str, batch: int, threshold: float,
    make_transformer: Any, make_inputs: Any, worst_error: Any,
) -> None:  # fmt: skip
    transformer = make_transformer(family, dtype)
    noise, conditioning = make_inputs(family, batch, dtype)
    given = (transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(alpha=alpha, threshold=threshold))
    chosen = torch.tensor(PAIRS[pairs][:batch])
    found = alignment_gradients(*given, pairs=chosen)
    expected = alignment_gradients(*given, pairs=chosen, executor="reference")
    error, name = worst_error(found.grads, expected.grads)
    assert error <= 1, f"{name}: {error:.2g} times the tolerance"
    assert any(gradient.any() for gradient in expected.grads.values())
    assert expected.grads.keys() == {name for name, _ in transformer.named_parameters()}
    assert torch.equal(found.rewards, expected.rewards)  # both at the rollout's x_0 itself
    few_ulps = 16 * torch.finfo(dtype).eps
    for field in ("loss", "weights", "d_j", "d_0"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=few_ulps, atol=few_ulps)


@pytest.mark.parametrize("executor", ["autograd", "reference"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_no_sample_below_the_threshold_means_zero_gradients(
    family: str, executor: Any, make_transformer: Any, make_inputs: Any
) -> None:
    transformer = make_transformer(family)
    noise, conditioning = make_inputs(family, 3)
    result = alignment_gradients(
        transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=-10.0), executor=executor
    )
    assert result.loss == 0
    assert result.grads.keys() == {name for name, _ in transformer.named_parameters()}
    assert not any(gradient.any() for gradient in result.grads.values())


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("microbatch", [1, 2, 5])
def test_microbatches_change_nothing(
    microbatch: int, make_transformer: Any, make_inputs: Any, worst_error: Any
) -> None:
    transformer = make_transformer("flux-guidance", torch.float64)
    noise, conditioning = make_inputs("flux-guidance", 3, torch.float64)
    given = (transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=10.0))
    pairs = torch.tensor(PAIRS["mixed"])
    whole = alignment_gradients(*given, pairs=pairs)
    split = alignment_gradients(*given, pairs=pairs, microbatch=microbatch)
    assert worst_error(split.grads, whole.grads)[0] <= 1
    torch.testing.assert_close(split.rewards, whole.rewards, rtol=1e-13, atol=0)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("family", ["flux-guidance", "sd3"])
def test_gradient_is_the_surrogates_derivative(
    family: str, alpha: float, make_transformer: Any, make_inputs: Any
) -> None:
    """Finite differences. With every stop-gradient held at its value, the surrogate loss is a plain function of theta:
    x_j(theta) = x_j + leap_j(theta) - leap_j, model input x_j + alpha (x_j(theta) - x_j),
    x_0(theta) = x_0 + leap_0(theta) - leap_0, L(theta) = mean w max(0, lambda - r(x_0(theta))).
    Every parameter moves by about h, along a random direction. Central differences of h = 1e-4 and 5e-5 with one
    Richardson step leave a truncation of order h^4 and a rounding of eps / h = 4e-12 of the loss; 1e-9 is asked for.
    """
    transformer = make_transformer(family, torch.float64)
    noise, conditioning = make_inputs(family, 3, torch.float64)
    pairs, method = torch.tensor(PAIRS["mixed"]), LeapAlign(alpha=alpha, threshold=0.5)
    result = alignment_gradients(transformer, conditioning, noise, SIGMAS, bounded_reward, method, pairs=pairs)
    trajectory = rollout(transformer, conditioning, noise, SIGMAS)
    k, j = pairs.unbind(1)
    x_k, x_j, x_0 = trajectory.at(k), trajectory.at(j), trajectory.final
    scale = 1000.0 if family == "sd3" else 1.0
    shape = (-1, *[1] * (noise.ndim - 1))

    def v(x: Tensor, s: Tensor) -> Tensor:
        return transformer(hidden_states=x, timestep=s * scale, return_dict=False, **conditioning)[0]

    @torch.no_grad()
    def leaps(connected: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leap_j = x_k - (SIGMAS[k] - SIGMAS[j]).reshape(shape) * v(x_k, SIGMAS[k])
        moved_j = connected(leap_j)
        return leap_j, moved_j - SIGMAS[j].reshape(shape) * v(x_j + alpha * (moved_j - x_j), SIGMAS[j])

    held_j, held_0 = leaps(lambda _: x_j)

    def surrogate_loss() -> float:
        _, leap_0 = leaps(lambda leap_j: x_j + leap_j - held_j)
        hinge = (method.threshold - bounded_reward(x_0 + leap_0 - held_0)).clamp(min=0)
        return (result.weights * hinge).mean().item()

    generator = torch.Generator().manual_seed(6)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in transformer.named_parameters()}
    home = {n: p.detach().clone() for n, p in transformer.named_parameters()}

    def slope(h: float) -> float:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for n, p in transformer.named_parameters():
                    p.copy_(home[n] + sign * h * direction[n])
            values.append(surrogate_loss())
        return (values[0] - values[1]) / (2 * h)

    numeric = (4 * slope(5e-5) - slope(1e-4)) / 3
    analytic = sum((result.grads[n] * direction[n]).sum().item() for n in direction)
    assert analytic == pytest.approx(numeric, rel=1e-9)


@pytest.mark.parametrize("executor", ["autograd", "reference"])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_closed_form_of_a_linear_flow(linear_flow: Any, alpha: float, pairs: str, executor: Any) -> None:
    """Method, sample by sample: g = -w q / B below the threshold, c_j = -s_j g, u = c_j A, y = g + alpha u,
    c_k = -(s_k - s_j) y, dA = c_j^T x_j + c_k^T x_k, db = s_j c_j + s_k c_k.
    """
    model, conditioning, noise, q = linear_problem(linear_flow)

    def reward(x: Tensor) -> Tensor:
        return (x * q).flatten(1).sum(1)

    a, b, p = model.a.detach(), model.b.detach(), conditioning["pooled_projections"]
    latents = [noise]
    for i in range(5):
        v = latents[i] @ a.T + SIGMAS[i] * b + p[:, None]
        latents.append(latents[i] + (SIGMAS[i + 1] - SIGMAS[i]) * v)
    rewards = reward(latents[5])
    threshold = rewards.median().item() + 1e-3  # two of the three samples are below it
    d_a, d_b, loss = torch.zeros_like(a), torch.zeros_like(b), 0.0
    for sample, (k, j) in enumerate(PAIRS[pairs]):
        s_k, s_j = SIGMAS[k], SIGMAS[j]
        x_k, x_j, x_0 = (latents[i][sample] for i in (k, j, 5))
        leap_j = x_k - (s_k - s_j) * (x_k @ a.T + s_k * b + p[sample])
        leap_0 = x_j - s_j * (x_j @ a.T + s_j * b + p[sample])
        w = 1 / (max((x_j - leap_j).abs().mean().item(), 0.1) + max((x_0 - leap_0).abs().mean().item(), 0.1))
        if rewards[sample] >= threshold:
            continue
        loss += w * (threshold - rewards[sample].item()) / 3
        g = -w * q[sample] / 3
        c_j = -s_j * g
        y = g + alpha * (c_j @ a)
        c_k = -(s_k - s_j) * y
        d_a += c_j.T @ x_j + c_k.T @ x_k
        d_b += s_j * c_j.sum(0) + s_k * c_k.sum(0)

    method = LeapAlign(alpha=alpha, threshold=threshold)
    result = alignment_gradients(
        model, conditioning, noise, SIGMAS, reward, method, pairs=torch.tensor(PAIRS[pairs]), executor=executor
    )
    torch.testing.assert_close(result.grads["a"], d_a, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.grads["b"], d_b, rtol=1e-12, atol=1e-13)
    assert not result.grads["unused"].any()
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("executor", ["autograd", "reference"])
def test_alpha_scales_the_model_input_and_not_the_carry(linear_flow: Any, executor: Any) -> None:
    """With A = 0 the input Jacobian vanishes: what reaches leg k is g itself, whatever alpha is."""
    model, conditioning, noise, q = linear_problem(linear_flow)
    model.a.data.zero_()
    pairs = torch.tensor(PAIRS["mixed"])
    results = [
        alignment_gradients(
            model, conditioning, noise, SIGMAS, lambda x: (x * q).flatten(1).sum(1),
            LeapAlign(alpha=alpha, threshold=100.0), pairs=pairs, executor=executor,
        )
        for alpha in (0, 0.3, 1)
    ]  # fmt: skip
    s_k, s_j = SIGMAS[pairs].unbind(1)
    c_total = (results[0].weights / 3 * (s_j * s_j + (s_k - s_j) * s_k))[:, None] * q.sum(1)
    for result in results:
        torch.testing.assert_close(result.grads["b"], c_total.sum(0), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("executor", ["autograd", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_reward_sees_the_rollouts_x_0_bit_for_bit(
    dtype: torch.dtype, executor: Any, make_transformer: Any, make_inputs: Any
) -> None:
    transformer = make_transformer("flux", dtype)
    noise, conditioning = make_inputs("flux", 3)
    conditioning = {name: value.to(dtype) for name, value in conditioning.items()}
    seen: list[Tensor] = []

    def reward(latents: Tensor) -> Tensor:
        seen.append(latents.detach().clone())
        return bounded_reward(latents)

    early = torch.tensor([[0, 1]] * 3)  # a long second leap: its prediction is far from x_0
    alignment_gradients(transformer, conditioning, noise, SIGMAS, reward, LeapAlign(), pairs=early, executor=executor)
    (x_0,) = seen
    assert torch.equal(x_0, rollout(transformer, conditioning, noise, SIGMAS).final)


@pytest.mark.parametrize("executor", ["autograd", "reference"])
def test_the_hinge_is_flat_at_the_threshold_itself(linear_flow: Any, executor: Any) -> None:
    """Sample 0 sits exactly at the threshold, sample 1 an ulp below, sample 2 above; all with a reward gradient."""
    model, conditioning, noise, q = linear_problem(linear_flow)
    values = torch.tensor([0.5, math.nextafter(0.5, 0), 0.75], dtype=torch.float64)

    def reward(x: Tensor) -> Tensor:
        slope = (x * q).flatten(1).sum(1)
        return values + (slope - slope.detach())

    given = {"pairs": torch.tensor(PAIRS["extreme"]), "executor": executor}
    both = alignment_gradients(model, conditioning, noise, SIGMAS, reward, LeapAlign(threshold=0.5), **given)
    assert torch.equal(both.rewards, values)
    values[1] = 0.6
    none = alignment_gradients(model, conditioning, noise, SIGMAS, reward, LeapAlign(threshold=0.5), **given)
    assert both.grads["a"].any()
    assert not none.grads["a"].any()
    _, _, g = reward_gradient(reward, noise, both.weights, 0.5)
    assert not g.any()


def test_weights_and_hinge_are_per_sample(make_transformer: Any, make_inputs: Any, worst_error: Any) -> None:
    """A batch is the mean of its samples, each with its own pair, weight and hinge."""
    transformer = make_transformer("flux-guidance")
    noise, conditioning = make_inputs("flux-guidance", 3)
    pairs, method = torch.tensor(PAIRS["mixed"]), LeapAlign(threshold=0.5)
    batch = alignment_gradients(transformer, conditioning, noise, SIGMAS, bounded_reward, method, pairs=pairs)
    mean = {name: torch.zeros_like(gradient) for name, gradient in batch.grads.items()}
    for b in range(3):
        own = {n: t if n.endswith("_ids") else t[b : b + 1] for n, t in conditioning.items()}
        reward = SelectableReward(OFFSETS[b : b + 1])
        single = alignment_gradients(transformer, own, noise[b : b + 1], SIGMAS, reward, method, pairs=pairs[b : b + 1])
        for name, gradient in single.grads.items():
            mean[name] += gradient / 3
        for field in ("weights", "d_j", "d_0", "rewards"):  # float32 through five steps of other matrix shapes
            torch.testing.assert_close(getattr(single, field)[0], getattr(batch, field)[b], rtol=1e-5, atol=1e-6)
    assert worst_error(mean, batch.grads)[0] <= 1


class SelectableReward:
    """A reward with something of each sample's own, here an offset, that knows how to give rows of itself."""

    def __init__(self, offsets: Tensor) -> None:
        self.offsets = offsets
        self.sizes: list[int] = []

    def __call__(self, latents: Tensor) -> Tensor:
        return bounded_reward(latents, self.offsets)

    def select(self, rows: slice) -> Callable[[Tensor], Tensor]:
        def of_rows(latents: Tensor) -> Tensor:
            self.sizes.append(len(latents))
            return bounded_reward(latents, self.offsets[rows])

        return of_rows


def test_a_reward_with_select_is_called_by_microbatch() -> None:
    latents = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    whole = reward_gradient(bounded_reward, latents, weights, 0.5, microbatch=2)
    reward = SelectableReward(OFFSETS)
    split = reward_gradient(reward, latents, weights, 0.5, microbatch=2)
    assert reward.sizes == [2, 1]
    for found, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_reward_gradient_is_exact_zero_above_and_the_mean_over_the_batch() -> None:
    latents = torch.ones(3, 2, 2, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    slopes = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    rewards, loss, g = reward_gradient(lambda x: slopes * x.flatten(1).sum(1), latents, weights, 1.0)
    assert rewards.tolist() == pytest.approx([0.4, 0.8, 1.2])
    assert loss.item() == pytest.approx((1 * 0.6 + 2 * 0.2 + 0) / 3)
    assert g[:, 0, 0].tolist() == pytest.approx([-0.1 / 3, -0.4 / 3, 0.0])
    assert not g[2].any()


def test_inactive_samples_are_left_out_of_every_product(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux")
    noise, conditioning = make_inputs("flux", 3)
    rows: list[tuple[int, bool]] = []
    transformer.register_forward_pre_hook(
        lambda module, args, given: rows.append((len(given["hidden_states"]), torch.is_grad_enabled())),
        with_kwargs=True,
    )
    alignment_gradients(transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=0.5))
    assert rows == [(3, False)] * 5 + [(2, True)] * 2  # sample 1 is above the threshold
    rows.clear()
    alignment_gradients(transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=-10.0))
    assert rows == [(3, False)] * 5
