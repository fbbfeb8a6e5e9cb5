"""What `alignment_gradients` leaves as it was, frees, refuses and names."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leapalign import LeapAlign, alignment_gradients
from tests.method.problems import SIGMAS, bounded_reward, linear_problem


class Saved:
    """A tensor that some graph keeps for its backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("executor", ["autograd", "reference"])
def test_no_graph_outlives_its_phase_or_leg(executor: Any, make_transformer: Any, make_inputs: Any) -> None:
    """Tensors saved for a backward, counted whenever a phase or leg begins. The oracle shows that the count works."""
    transformer = make_transformer("flux")
    noise, conditioning = make_inputs("flux", 3)
    living: weakref.WeakSet[Saved] = weakref.WeakSet()
    counts: list[int] = []

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        living.add(saved)
        return saved

    def reward(latents: Tensor) -> Tensor:
        counts.append(len(living))
        return bounded_reward(latents)

    transformer.register_forward_pre_hook(lambda *_: counts.append(len(living)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        alignment_gradients(transformer, conditioning, noise, SIGMAS, reward, LeapAlign(), executor=executor)
    assert len(counts) == 5 + 1 + 2
    assert all(count == 0 for count in counts) == (executor == "autograd")


@pytest.mark.parametrize("executor", ["autograd", "reference"])
def test_nothing_of_the_transformer_is_changed(executor: Any, make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("sd3")
    noise, conditioning = make_inputs("sd3", 2)
    transformer.train()
    transformer.context_embedder.eval().requires_grad_(False)
    transformer.proj_out.bias.grad = torch.full_like(transformer.proj_out.bias, 7.0)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    modes = [module.training for module in transformer.modules()]
    result = alignment_gradients(
        transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(), executor=executor
    )
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert (
        result.grads.keys()
        == trained
        == {n for n in before if n != "pos_embed.pos_embed"}
        - {
            "context_embedder.weight",
            "context_embedder.bias",
        }
    )
    assert [module.training for module in transformer.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    assert (transformer.proj_out.bias.grad == 7).all()
    assert transformer.proj_out.weight.grad is None
    assert not any(getattr(result, field).requires_grad for field in ("loss", "rewards", "weights", "d_j", "d_0"))
    assert not any(gradient.requires_grad for gradient in result.grads.values())


@pytest.mark.parametrize("executor", ["autograd", "reference"])
def test_dropout_never_acts(executor: Any, make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux")
    noise, conditioning = make_inputs("flux", 3)
    given = (conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=10.0))
    expected = alignment_gradients(transformer, *given, executor=executor)
    dropouts = [module for module in transformer.modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    for module in dropouts:
        module.p = 0.5
    found = alignment_gradients(transformer.train(), *given, executor=executor)
    assert all(torch.equal(found.grads[name], gradient) for name, gradient in expected.grads.items())


@pytest.mark.parametrize("executor", ["autograd", "reference"])
def test_gradient_checkpointing_is_transparent(executor: Any, make_transformer: Any, make_inputs: Any) -> None:
    noise, conditioning = make_inputs("flux", 3)
    plain, checkpointed = make_transformer("flux"), make_transformer("flux")
    checkpointed.enable_gradient_checkpointing()
    first, second = (
        alignment_gradients(t, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(), executor=executor)
        for t in (plain, checkpointed)
    )
    assert all(torch.equal(first.grads[name], gradient) for name, gradient in second.grads.items())


def test_under_autocast_the_float32_weights_still_get_their_gradients(make_transformer: Any, make_inputs: Any) -> None:
    """Autocast caches the weights it casts; casts made in the rollout, without grad, must not cut the products off.

    bfloat16 keeps 8 bits: gradients that went through it agree with float32's to a tenth in direction, no better.
    """
    transformer = make_transformer("flux")
    noise, conditioning = make_inputs("flux", 3)
    given = (transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=10.0))
    expected = alignment_gradients(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = alignment_gradients(*given)
    for name, gradient in expected.grads.items():
        if gradient.ndim == 2:  # matrices; single biases may be mostly rounding
            assert found.grads[name].dtype == torch.float32
            cosine = torch.nn.functional.cosine_similarity(found.grads[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.9, name


def test_frozen_transformer_has_no_gradients(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux").requires_grad_(False)
    noise, conditioning = make_inputs("flux", 2)
    for executor in ("autograd", "reference"):
        result = alignment_gradients(
            transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(), executor=executor
        )
        assert result.grads == {}
        assert result.loss > 0


def test_pairs_come_from_the_generator_or_a_fresh_one_seeded_0(linear_flow: Any) -> None:
    model, conditioning, noise, _ = linear_problem(linear_flow)
    given = (model, conditioning, noise, SIGMAS, bounded_reward, LeapAlign())
    first, again = alignment_gradients(*given), alignment_gradients(*given)
    zero = alignment_gradients(*given, generator=torch.Generator().manual_seed(0))
    other = alignment_gradients(*given, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first.pairs, again.pairs)
    assert torch.equal(first.pairs, zero.pairs)
    assert not torch.equal(first.pairs, other.pairs)
    assert (first.pairs[:, 0] < first.pairs[:, 1]).all()
    int32 = alignment_gradients(*given, pairs=first.pairs.to(torch.int32))
    assert torch.equal(int32.grads["a"], first.grads["a"])
    assert first.seconds.keys() == {"rollout", "reward", "vjp"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": torch.tensor([[0, 2], [3, 3], [1, 2]])}, r"pairs\[1\] = \[3, 3\] with T = 5"),
        ({"pairs": torch.tensor([[0, 5], [0, 1], [1, 2]])}, r"pairs\[0\] = \[0, 5\]"),
        ({"pairs": torch.tensor([[-1, 2], [0, 1], [1, 2]])}, r"pairs\[0\] = \[-1, 2\]"),
        ({"pairs": torch.tensor([[0, 2]])}, r"give \(3, 2\) integer"),
        ({"pairs": torch.tensor([[0.0, 2.0]] * 3)}, "float32"),
        ({"sigmas": torch.tensor([1.0, 0.0])}, "T >= 2"),
        ({"sigmas": torch.tensor([0.0, 0.5, 1.0])}, "sigmas goes from 0 to 1"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.5, 0.0])}, "fall strictly"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.1])}, "to 0.1"),
        ({"sigmas": torch.tensor([1000.0, 500.0, 0.0])}, "from 1000 to 0"),
        ({"sigmas": torch.tensor([1.0, math.nan, 0.0])}, "fall strictly"),
        ({"noise": torch.zeros(2, 5, 4)}, "'pooled_projections' has 3 rows and noise has 2"),
        ({"noise": torch.zeros(0, 5, 4)}, "B >= 1"),
        ({"microbatch": 0}, "microbatch=0"),
        ({"executor": "stream"}, "executor='stream'"),
        ({"reward": lambda x: x.sum()}, r"shape \(\) for 3 samples"),
        ({"reward": lambda x: x.detach().flatten(1).sum(1)}, "not differentiable"),
        ({"reward": lambda x: torch.ones(3, requires_grad=True)}, "not differentiable"),
        ({"transformer": nn.Linear(4, 4)}, "Linear is not supported"),
    ],
)
def test_refusals(linear_flow: Any, change: dict[str, Any], message: str) -> None:
    model, conditioning, noise, _ = linear_problem(linear_flow)
    given: dict[str, Any] = {"transformer": model, "conditioning": conditioning, "noise": noise, "sigmas": SIGMAS}
    given |= {"reward": bounded_reward, "method": LeapAlign(), **change}
    with pytest.raises(ValueError, match=message) as refusal:
        alignment_gradients(**given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("executor", ["autograd", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_names_its_samples(linear_flow: Any, value: float, executor: Any) -> None:
    model, conditioning, noise, _ = linear_problem(linear_flow)
    offsets = torch.tensor([0.0, value, value])
    with pytest.raises(FloatingPointError, match=r"reward is not finite for samples \[1, 2\]"):
        alignment_gradients(
            model, conditioning, noise, SIGMAS, lambda x: bounded_reward(x, offsets), LeapAlign(), executor=executor
        )


def test_a_reward_gradient_that_is_not_finite_names_its_samples(linear_flow: Any) -> None:
    model, conditioning, noise, _ = linear_problem(linear_flow)
    root = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

    def reward(x: Tensor) -> Tensor:  # the root's slope at 0 is infinite
        return (x.flatten(1).sum(1) * (1 - root)).abs().mul(0).sqrt() + x.flatten(1).mean(1)

    with pytest.raises(FloatingPointError, match="reward gradient is not finite for samples"):
        alignment_gradients(model, conditioning, noise, SIGMAS, reward, LeapAlign(threshold=1e9))
