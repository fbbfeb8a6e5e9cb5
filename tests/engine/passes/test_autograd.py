"""The drop-in in somebody else's training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leapalign.engine.backbones import SequentialBackbone
from leapalign.engine.model import StreamedModel
from leapalign.engine.plan import MemoryPlan

STEPS = 3


def two_calls(transformer: Any, latents: Tensor, conditioning: dict[str, Any]) -> Tensor:
    """A foreign loss of two nested evaluations, the second at a point that the first one leads to."""
    sigma = torch.tensor([0.9, 0.8], dtype=latents.dtype)
    first = transformer(hidden_states=latents, timestep=sigma, return_dict=False, **conditioning)[0]
    moved = latents - 0.4 * first
    second = transformer(hidden_states=0.3 * moved + 0.7 * moved.detach(), timestep=sigma / 2, **conditioning).sample
    return (moved - 0.4 * second).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every `grad` that there is."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(
    transformer: Any, latents: Tensor, conditioning: dict[str, Any], zero: Callable[[Any], None]
) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """(losses, input gradients, weights) of a few AdamW steps."""
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    losses, inputs = [], []
    for _ in range(STEPS):
        x = latents.clone().requires_grad_()
        loss = two_calls(transformer, x, conditioning)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 0.5)
        optimizer.step()
        zero(optimizer)
        losses.append(loss.item())
        assert x.grad is not None
        inputs.append(x.grad)
    return losses, inputs, [parameter.detach().clone() for parameter in transformer.parameters()]


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(
    "zero", [lambda o: o.zero_grad(), lambda o: o.zero_grad(set_to_none=False)], ids=["none", "zero"]
)
@pytest.mark.parametrize("plan", [MemoryPlan(), MemoryPlan(microbatch=None, resident="all", hoist=False, every=2)])
def test_a_foreign_loop_of_two_calls_trains_the_same(
    plan: MemoryPlan, zero: Any, make_transformer: Any, make_inputs: Any
) -> None:
    latents, conditioning = make_inputs("flux-guidance", 2, torch.float64)
    plain = make_transformer("flux-guidance", torch.float64)
    expected = trained(plain, latents, conditioning, zero)
    model = StreamedModel(make_transformer("flux-guidance", torch.float64), plan, device="cpu")
    found = trained(model, latents, conditioning, zero)
    # AdamW divides by |g| in its first steps: 1e-10 in a gradient of 1e-4 (times eps-free lr 1e-3) stays below 1e-7.
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} <= {torch.float64}
    model.close()


@pytest.mark.usefixtures("float64_throughout")
def test_gradients_accumulate_onto_whatever_is_there(make_transformer: Any, make_inputs: Any) -> None:
    latents, conditioning = make_inputs("flux", 2, torch.float64)
    plain = make_transformer("flux", torch.float64)
    model = StreamedModel(make_transformer("flux", torch.float64), device="cpu")
    for transformer in (plain, model):
        parameters = list(transformer.parameters())
        two_calls(transformer, latents, conditioning).backward()
        parameters[0].grad = torch.ones_like(parameters[0])  # somebody else's tensor
        parameters[3].grad = None
        two_calls(transformer, latents, conditioning).backward()
    names = [name for name, _ in plain.named_parameters()]
    for name, want, got in zip(names, plain.parameters(), model.parameters(), strict=True):
        expected = torch.zeros_like(want) if want.grad is None else want.grad
        torch.testing.assert_close(got.grad, expected, rtol=1e-10, atol=1e-12, msg=name)
    model.close()


def test_no_grad_and_frozen_weights(make_transformer: Any, make_inputs: Any) -> None:
    latents, conditioning = make_inputs("flux", 2)
    inputs = {"timestep": torch.tensor([0.9, 0.5]), "return_dict": False, **conditioning}
    model = StreamedModel(make_transformer("flux"), device="cpu")
    with torch.no_grad():
        assert not model(hidden_states=latents, **inputs)[0].requires_grad
    assert model(hidden_states=latents, **inputs)[0].requires_grad
    model.requires_grad_(False)
    assert not model(hidden_states=latents, **inputs)[0].requires_grad
    x = latents.clone().requires_grad_()
    model(hidden_states=x, **inputs)[0].sum().backward()
    y = latents.clone().requires_grad_()
    make_transformer("flux")(hidden_states=y, **inputs)[0].sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=2e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.close()


def test_autocast_around_the_model_changes_nothing(make_transformer: Any, make_inputs: Any) -> None:
    """Blocks are recomputed outside of the caller's autocast: they must be evaluated outside of it as well."""
    latents, conditioning = make_inputs("flux", 2)
    model = StreamedModel(make_transformer("flux"), device="cpu")
    two_calls(model, latents, conditioning).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = two_calls(model, latents, conditioning)
    loss.backward()
    assert expected
    for want, parameter in zip(expected, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(want, parameter.grad)
    model.close()


def test_a_step_between_forward_and_backward_is_an_error(make_transformer: Any, make_inputs: Any) -> None:
    latents, conditioning = make_inputs("flux", 2)
    model = StreamedModel(make_transformer("flux"), device="cpu")
    loss = two_calls(model, latents, conditioning)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()
    model.close()


def test_input_gradients_alone_leave_the_weights_gradients_alone(make_transformer: Any, make_inputs: Any) -> None:
    latents, conditioning = make_inputs("flux", 2)
    model = StreamedModel(make_transformer("flux"), device="cpu")
    x = latents.clone().requires_grad_()
    two_calls(model, x, conditioning).backward()
    expected = x.grad
    before = gradients(model)
    x.grad = None
    (found,) = torch.autograd.grad(two_calls(model, x, conditioning), x)
    two_calls(model, x, conditioning).backward(inputs=[x])
    assert expected is not None and x.grad is not None
    assert torch.equal(found, expected) and torch.equal(x.grad, expected)
    assert before
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())
    model.close()


def test_a_graph_serves_once_unless_it_is_retained(make_transformer: Any, make_inputs: Any) -> None:
    latents, conditioning = make_inputs("flux", 2)
    model = StreamedModel(make_transformer("flux"), device="cpu")
    loss = two_calls(model, latents, conditioning)
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name])
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    model.close()


def test_block_inputs_do_not_outlive_the_backward_pass(make_transformer: Any, make_inputs: Any) -> None:
    """The usual loop holds the last loss while it makes the next one."""
    latents, conditioning = make_inputs("flux", 2)
    model = StreamedModel(make_transformer("flux"), device="cpu")
    homes, losses = [], []
    for _ in range(3):
        losses.append(two_calls(model, latents, conditioning))
        losses[-1].backward()
        homes.append(sum(buffer.place == "region" for buffer in model.streamer._buffers.values()))
    assert homes[0] == homes[1] == homes[2]
    model.close()


def test_an_input_changed_in_place_is_an_error(make_transformer: Any, make_inputs: Any) -> None:
    """It is read again in the backward pass."""
    latents, conditioning = make_inputs("flux", 2)
    model = StreamedModel(make_transformer("flux"), device="cpu")
    loss = two_calls(model, latents, conditioning)
    latents.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    model.close()


@pytest.mark.parametrize("family", ["flux-guidance", "sd3"])
def test_arguments_by_place(family: str, make_transformer: Any, make_inputs: Any) -> None:
    latents, conditioning = make_inputs(family, 2)
    model = StreamedModel(make_transformer(family), device="cpu")
    sigma = torch.tensor([0.9, 0.5])
    given = {"hidden_states": latents, "timestep": sigma, **conditioning}
    placed = [given.pop(name) for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")]
    with torch.no_grad():
        expected = make_transformer(family)(*placed, **given, return_dict=False)[0]
        torch.testing.assert_close(model(*placed, **given, return_dict=False)[0], expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(TypeError, match="hidden_states is given twice"):
            model(*placed, hidden_states=latents, **given)
    model.close()


class Repeated(nn.Module):
    """A model of somebody else's: a tied embedding, one block used twice, and a weight that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        shared = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.layers = nn.ModuleList([shared, nn.Linear(6, 6), shared])
        self.output = nn.Linear(6, 7, bias=False)
        self.output.weight = self.embedding.weight
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        result: Tensor = self.output(x)
        return result


def repeated(device: str = "cpu") -> tuple[Repeated, SequentialBackbone]:
    torch.manual_seed(4)
    module = Repeated().double()
    backbone = SequentialBackbone(
        module,
        module.layers,
        stem=lambda m, inputs: (m.embedding(inputs["tokens"]),),
        block=lambda layer, carried, _: (carried[0] + layer(carried[0]),),
        head=lambda m, carried, _: m.output(carried[0]),
        device=torch.device(device),
    )
    return module, backbone


def test_tied_shared_and_unused_weights() -> None:
    plain = repeated()[0]
    model = StreamedModel(repeated()[1], MemoryPlan(microbatch=1))
    tokens = torch.tensor([[0, 1, 2], [3, 1, 6]])
    for _ in range(2):  # the second time onto the first
        loss = model(tokens=tokens).square().mean()
        loss.backward()
        expected = plain(tokens).square().mean()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for (name, want), got in zip(plain.named_parameters(), model.parameters(), strict=True):
            if want.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert plain.spare.grad is None
    model.close()
