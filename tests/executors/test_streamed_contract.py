"""What the streamed executor leaves out, leaves as it was, and refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leapalign import LeapAlign, alignment_gradients
from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.passes.vjp import ensure_grads
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.gradients import GradientDictionary
from leapalign.executors.streamed import streamed_rollout
from tests.executors.problems import BATCH, MODES, PAIRS, SIGMAS, bounded_reward


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_no_active_sample_means_zero_gradients_and_no_products(
    family: str, mode: Any, make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamedModel, "vjp", lambda *_, **__: pytest.fail("a product for no sample"))
    transformer = make_transformer(family)
    noise, conditioning = make_inputs(family, BATCH)
    result = alignment_gradients(
        transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=-10.0), executor=mode
    )
    assert result.loss == 0
    expected: dict[str, Tensor] = {}
    ensure_grads(expected, dict(transformer.named_parameters()))
    assert result.grads.keys() == expected.keys()
    assert all(torch.equal(result.grads[name], zero) for name, zero in expected.items())


@pytest.mark.parametrize("mode", MODES)
def test_inactive_samples_are_left_out_of_every_product(
    mode: Any, make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[list[int]] = []
    vjp = StreamedModel.vjp

    def counted(self: StreamedModel, legs: Any, **options: Any) -> Any:
        sizes.append([len(leg.cotangent) for leg in legs])
        return vjp(self, legs, **options)

    monkeypatch.setattr(StreamedModel, "vjp", counted)
    noise, conditioning = make_inputs("flux", BATCH)
    given = (conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=0.5))
    alignment_gradients(make_transformer("flux"), *given, executor=mode)
    assert sizes == ([[2], [2, 2]] if mode == "streamed-paired" else [[2], [2]])
    sizes.clear()
    unnested = (*given[:-1], LeapAlign(alpha=0, threshold=0.5))
    alignment_gradients(make_transformer("flux"), *unnested, executor=mode)
    assert sizes == [[2, 2]]  # no leg waits for another one


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["flux-guidance", "sd3"])
def test_nothing_of_a_plain_transformer_is_changed(
    family: str, mode: Any, make_transformer: Any, make_inputs: Any, worst_error: Any
) -> None:
    transformer = make_transformer(family)
    noise, conditioning = make_inputs(family, BATCH)
    transformer.train()
    transformer.context_embedder.eval().requires_grad_(False)  # all of a unit's weights, and one in the midst of others
    frozen = transformer.transformer_blocks[0].attn.to_q.weight.requires_grad_(False)
    transformer.proj_out.bias.grad = torch.full_like(transformer.proj_out.bias, 7.0)
    held = {name: parameter.data_ptr() for name, parameter in transformer.named_parameters()}
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    modes = [module.training for module in transformer.modules()]
    given = (transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=0.5))
    result = alignment_gradients(*given, pairs=PAIRS, executor=mode, microbatch=2)
    reference = alignment_gradients(*given, pairs=PAIRS, executor="reference")
    assert worst_error(result.grads, reference.grads)[0] <= 1
    assert not any(parameter is frozen for n, parameter in transformer.named_parameters() if n in result.grads)
    assert [module.training for module in transformer.modules()] == modes
    assert {name: parameter.data_ptr() for name, parameter in transformer.named_parameters()} == held
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    assert (transformer.proj_out.bias.grad == 7).all()
    assert transformer.proj_out.weight.grad is None
    assert not any(gradient.requires_grad for gradient in result.grads.values())
    assert result.seconds.keys() == {"rollout", "reward", "vjp"}


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_transformer_has_no_gradients(mode: Any, make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux").requires_grad_(False)
    noise, conditioning = make_inputs("flux", 2)
    result = alignment_gradients(transformer, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(), executor=mode)
    assert result.grads == {}
    assert result.loss > 0


def test_a_step_that_fails_leaves_nothing_to_the_next_one(
    make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise, conditioning = make_inputs("flux", BATCH)
    model = StreamedModel(make_transformer("flux"), MemoryPlan(), device="cpu")

    def run(reward: Callable[[Tensor], Tensor] = bounded_reward) -> dict[str, Tensor]:
        method = LeapAlign(threshold=10.0)
        return alignment_gradients(model, conditioning, noise, SIGMAS, reward, method, executor="streamed-held").grads

    expected = run()
    with pytest.raises(FloatingPointError, match=r"samples \[0, 1, 2\]"):
        run(lambda x: bounded_reward(x) * torch.nan)
    assert all(torch.equal(expected[name], gradient) for name, gradient in run().items())

    def interrupted(sink: GradientDictionary, unit: str, gradients: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GradientDictionary, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):  # the first leg's gradients are held then
            run()
    assert all(torch.equal(expected[name], gradient) for name, gradient in run().items())
    model.close()


def shrink(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def fused_step(model: nn.Module) -> None:
    """SGD on the weights themselves; fused optimizers leave torch's version counters as they are."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()


@pytest.mark.parametrize("change", [shrink, fused_step])
@pytest.mark.parametrize("resident", ["none", "all"])
def test_weights_changed_on_the_host_are_what_the_next_step_uses(
    resident: Any, change: Callable[[nn.Module], None], make_transformer: Any, make_inputs: Any, worst_error: Any
) -> None:
    noise, conditioning = make_inputs("flux-guidance", BATCH)
    given = (conditioning, noise, SIGMAS, bounded_reward, LeapAlign(threshold=10.0))
    plain = make_transformer("flux-guidance")
    model = StreamedModel(make_transformer("flux-guidance"), MemoryPlan(resident=resident, slots=8), device="cpu")
    alignment_gradients(model, *given, pairs=PAIRS, executor="streamed-paired")
    change(model)
    change(plain)
    found = alignment_gradients(model, *given, pairs=PAIRS, executor="streamed-paired")
    model.close()
    expected = alignment_gradients(plain, *given, pairs=PAIRS, executor="reference")
    assert worst_error(found.grads, expected.grads)[0] <= 1


@pytest.mark.parametrize("executor", ["autograd", "reference"])
def test_a_streamed_model_has_no_graph_to_give(executor: Any, make_transformer: Any, make_inputs: Any) -> None:
    noise, conditioning = make_inputs("flux", 2)
    model = StreamedModel(make_transformer("flux"), MemoryPlan(), device="cpu")
    with pytest.raises(ValueError, match=f"executor='{executor}' .* the executor streamed") as refusal:
        alignment_gradients(model, conditioning, noise, SIGMAS, bounded_reward, LeapAlign(), executor=executor)
    assert "\n" not in str(refusal.value)
    model.close()


def test_what_cannot_be_streamed_is_refused_in_one_line(linear_flow: Any) -> None:
    noise = torch.zeros(2, 3, 4, dtype=torch.float64)
    given = ({"pooled_projections": noise[:, 0]}, noise, SIGMAS, bounded_reward, LeapAlign())
    with pytest.raises(ValueError, match="SequentialBackbone") as refusal:
        alignment_gradients(linear_flow(), *given, executor="streamed-paired")
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="transformer is on meta: .* StreamedModel or a module on the CPU") as refusal:
        alignment_gradients(linear_flow().to("meta"), *given, executor="streamed-paired")
    assert "\n" not in str(refusal.value)


def test_gradients_are_on_the_host_in_float32(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux", torch.bfloat16)
    noise, conditioning = make_inputs("flux", BATCH)
    given = {name: value.to(torch.bfloat16) for name, value in conditioning.items()}
    plain = alignment_gradients(transformer, given, noise, SIGMAS, bounded_reward, LeapAlign(), pairs=PAIRS)
    for mode in MODES:
        found = alignment_gradients(
            transformer,
            given,
            noise,
            SIGMAS,
            bounded_reward,
            LeapAlign(),
            pairs=PAIRS,
            executor=mode,
        )
        for name, gradient in plain.grads.items():
            assert (found.grads[name].dtype, found.grads[name].device.type) == (torch.float32, "cpu")
            if gradient.ndim == 2:  # bfloat16 keeps 8 bits; single biases may be mostly rounding
                cosine = torch.nn.functional.cosine_similarity(found.grads[name].flatten(), gradient.flatten(), dim=0)
                assert cosine > 0.9, name


def test_the_dictionary_keeps_what_it_is_given() -> None:
    sink = GradientDictionary()
    left, right = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    passing = torch.ones(2)
    sink("unit", {"bias": passing, "weight": OuterProduct(left, right)})
    passing.zero_()  # its memory is used for the next unit
    assert torch.equal(sink.grads["bias"], torch.ones(2))
    torch.testing.assert_close(sink.grads["weight"], left.T @ right, rtol=1e-14, atol=1e-14)


def test_few_noise_levels_hoisted_at_once_give_the_same_latents(make_transformer: Any, make_inputs: Any) -> None:
    noise, conditioning = make_inputs("flux-guidance", BATCH, torch.float64)
    model = StreamedModel(make_transformer("flux-guidance", torch.float64), MemoryPlan(), device="cpu")
    at_once = streamed_rollout(model, conditioning, noise, SIGMAS).trajectory
    hoisted: list[int] = []
    hoist = model.hoist

    def counted(inputs: Any) -> Any:
        hoisted.append(len(inputs["timestep"]))
        return hoist(inputs)

    model.hoist = counted  # type: ignore[method-assign]
    few = streamed_rollout(model, conditioning, noise, SIGMAS, levels=2).trajectory
    assert hoisted == [BATCH * min(2, len(SIGMAS) - 1 - first) for first in range(0, len(SIGMAS) - 1, 2)]
    torch.testing.assert_close(few.latents, at_once.latents, rtol=1e-12, atol=1e-12)  # products of other row counts
    model.close()
