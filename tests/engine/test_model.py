"""The streamed model: values, vector-Jacobian products, held sums, sinks and what it leaves in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.passes.evaluation import Leg
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.gradients import GradientDictionary
from leapalign.engine.streaming.streamer import Streamer
from tests.engine.products import PLANS, expected_products, model_inputs


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", ["flux", "flux-guidance", "sd3"])
def test_values_and_products_equal_plain_autograd(
    family: str, plan: MemoryPlan, make_transformer: Any, make_inputs: Any, worst_error: Any
) -> None:
    inputs = model_inputs(family, make_inputs)
    expected = make_transformer(family, torch.float64)(**inputs, return_dict=False)[0].detach()
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = ("hidden_states", "pooled_projections", "encoder_hidden_states", "timestep")
    grads, input_grads = expected_products(make_transformer(family, torch.float64), inputs, cotangent, names)
    model = StreamedModel(make_transformer(family, torch.float64), plan, device="cpu")
    torch.testing.assert_close(model.evaluate(inputs), expected, rtol=1e-12, atol=1e-12)
    (found,) = model.vjp([Leg(inputs, cotangent, names)], params="deliver", sink=(sink := GradientDictionary()))
    for got, want in ((sink.grads, grads), (found, input_grads)):
        error, name = worst_error(got, want)
        assert error <= 1, f"{name}: {error:.2g} times the tolerance"
    model.close()


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("hoist", [True, False])
def test_held_and_delivered_sums_add_up(hoist: bool, make_transformer: Any, make_inputs: Any, worst_error: Any) -> None:
    """accumulate + accumulate + deliver of three legs of different sizes = the three together = their sum."""
    inputs = [model_inputs("flux-guidance", make_inputs, batch) for batch in (1, 2, 3)]
    cotangents = [(number + 1.0) * torch.ones_like(given["hidden_states"]) for number, given in enumerate(inputs)]
    parts = [
        expected_products(make_transformer("flux-guidance", torch.float64), given, cotangent, ())[0]
        for given, cotangent in zip(inputs, cotangents, strict=True)
    ]
    expected = {name: sum(part[name] for part in parts) for name in parts[0]}
    model = StreamedModel(make_transformer("flux-guidance", torch.float64), MemoryPlan(hoist=hoist), device="cpu")
    legs = [Leg(given, cotangent) for given, cotangent in zip(inputs, cotangents, strict=True)]
    model.vjp(legs[:1], params="accumulate")
    model.vjp(legs[1:2], params="accumulate")
    model.vjp(legs[2:], params="deliver", sink=(one_by_one := GradientDictionary()))
    model.vjp(legs, params="deliver", sink=(together := GradientDictionary()))  # nothing is held any more
    model.vjp(legs[:1], params="accumulate")
    model.sums.discard()
    model.vjp(legs, params="deliver", sink=(discarded := GradientDictionary()))
    for sink in (one_by_one, together, discarded):
        error, name = worst_error(sink.grads, expected)
        assert error <= 1, f"{name}: {error:.2g} times the tolerance"
    assert all(parameter.grad is None for parameter in model.parameters())
    model.close()


class Watching:
    """A sink on the device that checks its contract and lets go of every tensor."""

    on_host = False

    def __init__(self) -> None:
        self.names: list[str] = []
        self.factors = 0

    def __call__(self, unit: str, gradients: Any) -> None:
        for name, gradient in gradients.items():
            self.names.append(name)
            if isinstance(gradient, OuterProduct):
                self.factors += 1
            else:
                assert gradient.dtype == torch.float32
                assert gradient.isfinite().all()


def test_each_trainable_parameter_is_delivered_once(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("sd3")
    for name, parameter in transformer.named_parameters():
        if name.startswith(("transformer_blocks.0.attn.", "time_text_embed.text", "transformer_blocks.1.norm1.")):
            parameter.requires_grad_(False)
    model = StreamedModel(transformer, device="cpu")
    inputs = model_inputs("sd3", make_inputs, dtype=torch.float32)
    model.vjp([Leg(inputs, torch.ones_like(inputs["hidden_states"]))], params="deliver", sink=(sink := Watching()))
    assert sorted(sink.names) == sorted(name for name, p in transformer.named_parameters() if p.requires_grad)
    assert sink.factors == 4  # 2 + 2 adaLN linears of the blocks, norm_out, less the frozen one
    model.close()


def test_all_frozen_delivers_nothing(make_transformer: Any, make_inputs: Any) -> None:
    model = StreamedModel(make_transformer("flux").requires_grad_(False), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    leg = Leg(inputs, torch.ones_like(inputs["hidden_states"]), ("hidden_states",))
    (found,) = model.vjp([leg], params="deliver", sink=(sink := GradientDictionary()))
    assert not sink.grads
    assert found["hidden_states"].any()
    model.close()


def test_hoisted_rows_serve_any_evaluation(make_transformer: Any, make_inputs: Any) -> None:
    """All (step, sample) rows at once, picked in any order, give the bits of an evaluation that hoists for itself."""
    model = StreamedModel(make_transformer("flux-guidance"), MemoryPlan(microbatch=2), device="cpu")
    inputs = model_inputs("flux-guidance", make_inputs, dtype=torch.float32)
    rows = {name: torch.cat([inputs[name], inputs[name].flip(0)]) for name in model.backbone.condition_inputs}
    modulations = model.hoist(rows)
    assert modulations is not None
    own = model.evaluate(inputs)
    # A product of 6 rows may be blocked differently from one of 3.
    torch.testing.assert_close(
        model.evaluate(inputs, modulations=modulations.rows([0, 1, 2])), own, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        model.evaluate(inputs, modulations=modulations.rows([5, 4, 3])), own, rtol=1e-5, atol=1e-5
    )
    assert not torch.equal(model.evaluate(inputs, modulations=modulations.rows([1, 1, 2])), own)
    model.close()


def test_records_of_chosen_rows_replace_the_forward_pass(make_transformer: Any, make_inputs: Any) -> None:
    """Two evaluations leave samples in one record, in another order; the product from it has the same bits."""
    model = StreamedModel(make_transformer("flux"), MemoryPlan(microbatch=2), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    cotangent = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(2))
    model.vjp([Leg(inputs, cotangent)], params="deliver", sink=(expected := GradientDictionary()))
    record = model.record(3)
    model.evaluate(inputs, record=record, record_rows=[(0, 2), (2, 0)])
    model.evaluate(inputs, record=record, record_rows=[(1, 1)])
    leg = Leg(inputs, cotangent, record=record, record_rows=[2, 1, 0])
    model.vjp([leg], params="deliver", sink=(found := GradientDictionary()))
    assert all(torch.equal(found.grads[name], expected.grads[name]) for name in expected.grads)
    model.close()


@pytest.mark.parametrize("plan", [MemoryPlan(), MemoryPlan(hoist=False, every=2, slots=3)], ids=["plain", "every 2nd"])
def test_steady_state_allocates_no_slots(
    plan: MemoryPlan, make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    for kind in ("slot", "host"):
        original = getattr(Streamer, kind)

        def noting(self: Streamer, nbytes: int, original: Any = original) -> Any:
            made.append(nbytes)
            return original(self, nbytes)

        monkeypatch.setattr(Streamer, kind, noting)
    model = StreamedModel(make_transformer("flux"), plan, device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    counts = []
    for _ in range(4):
        leg = Leg(inputs, torch.ones_like(inputs["hidden_states"]), ("hidden_states",))
        model.vjp([leg], params="accumulate")
        model.vjp([leg], params="deliver", sink=GradientDictionary())
        assert leg.record is not None
        leg.record.drop()
        counts.append(len(made))
    assert made
    assert counts[1] == counts[2] == counts[3]
    model.close()


@pytest.mark.parametrize("hoist", [True, False])
def test_weights_travel_once_a_pass(
    hoist: bool, make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many microbatches and legs: a forward pass and a backward pass each load every unit once at most."""
    model = StreamedModel(make_transformer("flux"), MemoryPlan(hoist=hoist), device="cpu")
    names = {region.data_ptr(): name for name in model.store.units for region in [model.store.region(name)]}
    loads: list[str] = []
    original = Streamer.load

    def counting(self: Streamer, slot: Any, region: Any, copies: Any = None) -> None:
        if not isinstance(region, list) and region.tensor.data_ptr() in names:
            loads.append(names[region.tensor.data_ptr()])
        original(self, slot, region, copies)

    monkeypatch.setattr(Streamer, "load", counting)
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    modulations = model.hoist(inputs)
    rows = modulations.rows(range(3)) if modulations is not None else None
    modulation_units = {name for name in model.store.units if name.endswith("/modulation")}
    assert set(loads) == (modulation_units | {"condition"} if hoist else set())
    loads.clear()
    model.evaluate(inputs, modulations=rows)
    blocks = set(model.store.units) - modulation_units
    assert sorted(loads) == sorted(blocks - {"condition"} if hoist else blocks)
    record = model.record(3)
    model.evaluate(inputs, modulations=rows, record=record, record_rows=[(0, 0), (1, 1), (2, 2)])
    loads.clear()
    legs = [Leg(inputs, torch.ones_like(inputs["hidden_states"]), (), rows, record) for _ in range(2)]
    model.vjp(legs, params="deliver", sink=GradientDictionary())
    twice = set() if hoist else {"condition"}  # temb again, before the blocks
    assert len(loads) - len(twice & set(loads)) <= len(set(loads))
    assert set(loads) <= set(model.store.units)
    assert len(loads) >= len(model.store.units) - 2  # the last two of the forward pass are still in their slots
    model.close()


def test_parameters_are_views_of_the_store(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux")
    before = {name: (id(p), p.detach().clone()) for name, p in transformer.named_parameters()}
    model = StreamedModel(transformer, device="cpu")
    views = model.store.parameters()
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert (id(parameter), parameter.data_ptr()) == (before[name][0], views[name].data_ptr())
        assert torch.equal(parameter, before[name][1])
    with torch.no_grad():
        first = model.evaluate(inputs)
        for parameter in model.parameters():
            parameter.mul_(1.01)  # an optimizer's step on the host: the next pass streams the new weights
        second = model.evaluate(inputs)
        torch.testing.assert_close(second, transformer(**inputs, return_dict=False)[0], rtol=1e-5, atol=1e-5)
        assert (first - second).abs().max() > 1e-3
    model.close()


def test_resident_weights_on_the_cpu_are_the_store(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux")
    model = StreamedModel(transformer, MemoryPlan(resident="all"), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    with torch.no_grad():
        for factor in (1.0, 1.01, 0.98):
            for parameter in model.parameters():
                parameter.mul_(factor)
            expected = transformer(**inputs, return_dict=False)[0]
            torch.testing.assert_close(model.evaluate(inputs), expected, rtol=1e-5, atol=1e-5)
    model.close()


def test_saved_and_loaded_through_diffusers(make_transformer: Any, make_inputs: Any, tmp_path: Any) -> None:
    from diffusers import SD3Transformer2DModel

    inputs = model_inputs("sd3", make_inputs, dtype=torch.float32)
    model = StreamedModel(make_transformer("sd3"), device="cpu")
    expected = model.evaluate(inputs)
    model.save_pretrained(tmp_path / "stock")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "stock")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    again = StreamedModel.from_pretrained(tmp_path / "stock", dtype=torch.float32, device="cpu")
    assert torch.equal(again.evaluate(inputs), expected)
    assert again.config.num_layers == 2
    half = StreamedModel.from_pretrained(tmp_path / "stock", device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for opened in (model, again, half):
        opened.close()
