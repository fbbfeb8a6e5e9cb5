"""Where `alignment_gradients` leaves its gradients: in the result, in a sink, or in the model's held sums."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign import LeapAlign, alignment_gradients
from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.plan import MemoryPlan
from leapalign.kernels.host.pool import Handle

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0], dtype=torch.float64)
PAIRS = torch.tensor([[0, 2], [1, 3], [2, 3]])
MODES: list[Any] = ["streamed-paired", "streamed-held"]
ABOVE = LeapAlign(threshold=-10.0)  # no sample is active


def reward(latents: Tensor) -> Tensor:
    return 0.1 * torch.tanh((latents * latents.roll(1, dims=1) + latents).flatten(1).mean(1))


class Collected:
    """A sink that keeps dense copies; every parameter comes once, in float32 or float64."""

    def __init__(self, on_host: bool = True) -> None:
        self.on_host = on_host
        self.grads: dict[str, Tensor] = {}

    def __call__(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct]) -> None:
        for name, gradient in gradients.items():
            assert name not in self.grads, f"{name} was delivered twice"
            self.grads[name] = gradient.expand() if isinstance(gradient, OuterProduct) else gradient.clone()
            assert self.grads[name].dtype in (torch.float32, torch.float64)


class Late(Collected):
    """The same, but dense gradients are read in another thread, a while after the call."""

    def __init__(self, model: StreamedModel) -> None:
        super().__init__(on_host=True)
        self._model, self._thread = model, ThreadPoolExecutor(1)

    def __call__(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct]) -> None:
        if any(isinstance(gradient, OuterProduct) for gradient in gradients.values()):
            super().__call__(unit, gradients)
            return
        self._model.streamer.hand_over(
            lambda: [Reading(self._thread.submit(self._read, unit, gradients))], *self._model.gradients.delivered
        )

    def _read(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct]) -> None:
        time.sleep(0.02)
        super().__call__(unit, gradients)


class Reading(Handle):
    """Of a thread that stands for the host kernels'."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def result(self) -> float:
        self._future.result()
        return 0.0


@pytest.fixture
def problem(make_inputs: Any, float64_throughout: Any) -> dict[str, Any]:
    noise, conditioning = make_inputs("flux-guidance", 3, torch.float64)
    given = {"conditioning": conditioning, "noise": noise, "sigmas": SIGMAS, "reward": reward, "pairs": PAIRS}
    return {**given, "method": LeapAlign(threshold=10.0)}


@pytest.fixture(params=[True, False], ids=["hoisted", "plain"])
def model(make_transformer: Any, request: Any, float64_throughout: Any) -> Iterator[StreamedModel]:
    transformer = make_transformer("flux-guidance", torch.float64)
    transformer.context_embedder.requires_grad_(False)
    transformer.transformer_blocks[0].norm1.linear.weight.requires_grad_(False)
    made = StreamedModel(transformer, MemoryPlan(hoist=request.param), device="cpu")
    yield made
    made.close()


def dense(model: StreamedModel) -> dict[str, Tensor]:
    sums = model.sums.take("held")
    found: dict[str, Tensor] = {}
    for gradients in sums.values():
        found |= {n: g.expand(torch.float64) if isinstance(g, OuterProduct) else g for n, g in gradients.items()}
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_host", [True, False])
def test_a_sink_gets_what_the_result_would_hold(
    on_host: bool, mode: Any, model: StreamedModel, problem: dict[str, Any]
) -> None:
    expected = alignment_gradients(model, **problem, executor=mode)
    sink = Collected(on_host)
    found = alignment_gradients(model, **problem, executor=mode, sink=sink)
    assert found.grads == {}
    assert torch.equal(found.loss, expected.loss)
    assert sink.grads.keys() == expected.grads.keys()
    for name, gradient in expected.grads.items():  # factors are multiplied out in another order of blocks
        torch.testing.assert_close(sink.grads[name].double(), gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_stay_until_a_sink_has_read_them(mode: Any, model: StreamedModel, problem: dict[str, Any]) -> None:
    at_once, late = Collected(), Late(model)
    alignment_gradients(model, **problem, executor=mode, sink=at_once)
    alignment_gradients(model, **problem, executor=mode, sink=late)
    model.streamer.drain()
    assert late.grads.keys() == at_once.grads.keys()
    for name, gradient in at_once.grads.items():
        assert torch.equal(late.grads[name], gradient), name


@pytest.mark.parametrize("mode", MODES)
def test_passes_that_were_held_come_with_the_last_one(
    mode: Any, model: StreamedModel, problem: dict[str, Any], worst_error: Any
) -> None:
    other = {**problem, "noise": problem["noise"].flip(0), "pairs": PAIRS.flip(0)}
    one = alignment_gradients(model, **problem, executor=mode)
    two = alignment_gradients(model, **other, executor=mode)
    mean = {name: (gradient + two.grads[name]) / 2 for name, gradient in one.grads.items()}

    held = alignment_gradients(model, **problem, executor=mode, scale=0.5, hold=True)
    assert held.grads == {}
    assert torch.equal(held.loss, one.loss)  # the loss is the pass's own
    last = alignment_gradients(model, **other, executor=mode, scale=0.5)
    assert worst_error(last.grads, mean)[0] <= 1

    for given in (problem, other):
        alignment_gradients(model, **given, executor=mode, scale=0.5, hold=True)
    sums = dense(model)
    assert sums.keys() == mean.keys()
    assert worst_error(sums, mean)[0] <= 1
    assert not model.sums.take("held")

    # A last pass without an active sample delivers what was held.
    alignment_gradients(model, **problem, executor=mode, hold=True)
    last = alignment_gradients(model, **{**other, "method": ABOVE}, executor=mode)
    assert worst_error(last.grads, one.grads)[0] <= 1
    assert not model.sums.take("held")


@pytest.mark.parametrize("on_host", [True, False])
def test_without_an_active_sample_every_gradient_is_zero(
    on_host: bool, model: StreamedModel, problem: dict[str, Any]
) -> None:
    trainable = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    sink = Collected(on_host)
    result = alignment_gradients(model, **{**problem, "method": ABOVE}, executor="streamed-paired", sink=sink)
    assert result.loss == 0
    assert {name: gradient.shape for name, gradient in sink.grads.items()} == trainable
    assert not any(gradient.any() for gradient in sink.grads.values())

    alignment_gradients(model, **{**problem, "method": ABOVE}, executor="streamed-paired", hold=True)
    model.sums.fill()
    sums = dense(model)
    assert {name: gradient.shape for name, gradient in sums.items()} == trainable
    assert not any(gradient.any() for gradient in sums.values())


def test_zeros_are_held_only_where_nothing_is(model: StreamedModel, problem: dict[str, Any]) -> None:
    alignment_gradients(model, **problem, executor="streamed-held", hold=True)
    expected = {name: gradient.clone() for name, gradient in dense(model).items()}
    alignment_gradients(model, **problem, executor="streamed-held", hold=True)
    model.sums.fill()
    found = dense(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("executor", ["autograd", "reference", *MODES])
def test_the_scale_is_on_the_gradients_alone(
    executor: Any, make_transformer: Any, problem: dict[str, Any], worst_error: Any
) -> None:
    transformer = make_transformer("flux-guidance", torch.float64)
    one = alignment_gradients(transformer, **problem, executor=executor)
    third = alignment_gradients(transformer, **problem, executor=executor, scale=1 / 3)
    assert torch.equal(third.loss, one.loss)
    assert worst_error({name: 3 * gradient for name, gradient in third.grads.items()}, one.grads)[0] <= 1


def test_an_error_discards_what_was_held(model: StreamedModel, problem: dict[str, Any]) -> None:
    alignment_gradients(model, **problem, executor="streamed-held", hold=True)
    broken = {**problem, "reward": lambda latents: reward(latents) * torch.nan}
    with pytest.raises(FloatingPointError, match=r"samples \[0, 1, 2\]"):
        alignment_gradients(model, **broken, executor="streamed-held", hold=True)
    assert not model.sums.take("held")


@pytest.mark.parametrize("mode", MODES)
def test_a_cotangent_that_is_not_finite_comes_before_the_sink(
    mode: Any, model: StreamedModel, problem: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the active samples 0 and 2."""
    vjp = StreamedModel.vjp

    def broken(self: StreamedModel, legs: Any, **options: Any) -> Any:
        found = vjp(self, legs, **options)
        for gradients in found:
            for gradient in gradients.values():
                gradient[1, 0, 0] = torch.inf
        return found

    monkeypatch.setattr(StreamedModel, "vjp", broken)
    shifted = {**problem, "reward": lambda latents: reward(latents) + torch.tensor([0, 20, 0])}
    sink = Collected()
    with pytest.raises(FloatingPointError, match=r"the gradient at a leap's latents is not finite for samples \[2\]"):
        alignment_gradients(model, **shifted, executor=mode, sink=sink)
    assert not sink.grads
    assert not model.sums.take("held")


@pytest.mark.parametrize(
    ("executor", "options", "message"),
    [
        ("autograd", {"hold": True}, "executor='autograd' takes no hold=True: use streamed-paired"),
        ("reference", {"sink": Collected()}, "executor='reference' takes no sink"),
        ("streamed-held", {"sink": Collected(), "hold": True}, "both given"),
        ("streamed-held", {"hold": True}, "hold=True with a FluxTransformer2DModel: .* StreamedModel"),
    ],
)
def test_what_cannot_be_delivered_is_refused_in_one_line(
    executor: Any, options: dict[str, Any], message: str, make_transformer: Any, problem: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        alignment_gradients(make_transformer("flux-guidance", torch.float64), **problem, executor=executor, **options)
    assert "\n" not in str(refusal.value)
