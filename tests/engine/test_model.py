"""The streamed model: values, vector-Jacobian products, held sums, sinks and what it leaves in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.passes.evaluation import Evaluation, Leg
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.gradients import GradientDictionary
from leapalign.engine.streaming.streamer import Streamer
from leapalign.engine.streaming.weights import Weights

SIGMAS = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
PLANS = {
    "streamed": MemoryPlan(),
    "unhoisted": MemoryPlan(hoist=False),
    "whole batch, 3 slots": MemoryPlan(microbatch=None, slots=3),
    "every 2nd on the device": MemoryPlan(microbatch=2, block_inputs="device", every=2),
    "resident": MemoryPlan(microbatch=2, resident="all"),
    "every 3rd, unhoisted": MemoryPlan(every=3, hoist=False, slots=3),
}


def model_inputs(family: str, make_inputs: Any, batch: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    latents, conditioning = make_inputs(family, batch, dtype)
    timestep = SIGMAS[:batch].to(dtype) * (1000 if family == "sd3" else 1)
    return {"hidden_states": latents, "timestep": timestep, **conditioning}


def expected_products(
    transformer: nn.Module, inputs: dict[str, Any], cotangent: Tensor, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({parameter: gradient}, {input: gradient}) by one plain autograd graph."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    output = transformer(**{**inputs, **leaves}, return_dict=False)[0]
    weights = dict(transformer.named_parameters())
    found = torch.autograd.grad(output, [*weights.values(), *leaves.values()], cotangent, allow_unused=True)
    every = [
        torch.zeros_like(target) if gradient is None else gradient
        for target, gradient in zip([*weights.values(), *leaves.values()], found, strict=True)
    ]
    return dict(zip(weights, every, strict=False)), dict(zip(names, every[len(weights) :], strict=True))


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


def test_what_cannot_be_streamed_is_refused(make_transformer: Any, make_inputs: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="SequentialBackbone"):
        StreamedModel(nn.Linear(2, 2), device="cpu")
    mixed = make_transformer("flux")
    mixed.proj_out.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16.*float32.*convert"):
        StreamedModel(mixed, device="cpu")
    with pytest.raises(ValueError, match=r"no config\.json"):
        StreamedModel.from_pretrained(tmp_path)
    model = StreamedModel(make_transformer("flux"), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    with pytest.raises(ValueError, match="joint_attention_kwargs"):
        model(**inputs, joint_attention_kwargs={"scale": 2.0})
    leg = Leg(inputs, inputs["hidden_states"])
    with pytest.raises(ValueError, match="sink"):
        model.vjp([leg], params="deliver")
    with pytest.raises(ValueError, match="sink"):
        model.vjp([leg], sink=GradientDictionary())
    with pytest.raises(ValueError, match=r"bfloat16.*convert"):
        model.to(torch.bfloat16)
    assert model.to("cpu", torch.float32) is model
    with pytest.raises(ValueError, match="store"):
        model.half()
    with pytest.raises(ValueError, match="assign"):
        model.load_state_dict(model.state_dict(), assign=True)
    model.close()


def test_products_in_inference_mode_are_those_outside(make_transformer: Any, make_inputs: Any) -> None:
    model = StreamedModel(make_transformer("flux"), MemoryPlan(every=2), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)

    def product(given: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leg = Leg(given, torch.ones_like(inputs["hidden_states"]), ("hidden_states",))
        (found,) = model.vjp([leg], params="deliver", sink=(sink := GradientDictionary()))
        return found, sink.grads

    expected = product(inputs)
    with torch.inference_mode():
        within = product(inputs)
        copies = {name: value.clone() for name, value in inputs.items()}
    for found in (within, product(copies)):
        for got, want in zip(found, expected, strict=True):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)
    model.close()


def test_the_sink_is_called_without_grad(make_transformer: Any, make_inputs: Any) -> None:
    model = StreamedModel(make_transformer("flux"), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)

    class Descent:
        on_host = True

        def __call__(self, unit: str, gradients: Any) -> None:
            for name, gradient in gradients.items():
                whole = gradient.expand() if isinstance(gradient, OuterProduct) else gradient
                parameters[name].sub_(whole, alpha=1e-3)  # a leaf that requires grad

    parameters = dict(model.named_parameters())
    before = model.evaluate(inputs)
    model.vjp([Leg(inputs, torch.ones_like(inputs["hidden_states"]))], params="deliver", sink=Descent())
    assert model.evaluate(inputs).sum() < before.sum()
    model.close()


def test_what_was_made_with_other_weights_is_refused(make_transformer: Any, make_inputs: Any) -> None:
    model = StreamedModel(make_transformer("flux"), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    kept = [(row, row) for row in range(3)]

    def product(modulations: Any, record: Any) -> None:
        model.vjp([Leg(inputs, torch.ones_like(inputs["hidden_states"]), (), modulations, record)])

    hoisted, record = model.hoist(inputs), model.record(3)
    assert hoisted is not None
    rows = hoisted.rows(range(3))
    with pytest.raises(ValueError, match="block inputs are not there"):
        product(rows, record)
    model.evaluate(inputs, modulations=rows, record=record, record_rows=kept)
    product(rows, record)
    with torch.no_grad():
        model.proj_out.bias.add_(1)
    with pytest.raises(ValueError, match="block inputs belong to other weights"):
        product(None, record)
    with pytest.raises(ValueError, match="block inputs belong to other weights"):
        model.evaluate(inputs, record=record, record_rows=kept)
    with pytest.raises(ValueError, match="modulations belong to other weights"):
        model.evaluate(inputs, modulations=rows)
    record.drop()
    model.evaluate(inputs, record=record, record_rows=kept)
    with pytest.raises(ValueError, match="modulations belong to other weights"):
        product(rows, record)
    product(None, record)
    hoisted.drop()
    with pytest.raises(ValueError, match="modulations are not there"):
        product(rows, record)
    model.close()


def test_weights_loaded_into_the_store_are_what_the_next_pass_uses(
    make_transformer: Any, make_inputs: Any, tmp_path: Any
) -> None:
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    model = StreamedModel(make_transformer("flux"), MemoryPlan(slots=14), device="cpu")  # every unit has its slot
    first = model.evaluate(inputs)
    other = make_transformer("flux")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
        expected = other(**inputs, return_dict=False)[0]
    other.save_pretrained(tmp_path)
    model.store.load([tmp_path / "diffusion_pytorch_model.safetensors"])
    torch.testing.assert_close(model.evaluate(inputs), expected, rtol=1e-5, atol=1e-5)
    assert (first - expected).abs().max() > 1e-2
    model.close()


def test_per_sample_tensors_come_in_once_for_each_microbatch(
    make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block input, modulation and arriving gradient: while they are read the next ones are prefetched, none in vain."""
    inputs = model_inputs("flux", make_inputs, batch=3, dtype=torch.float32)
    inputs = {name: value if name[-4:] == "_ids" else torch.cat([value, value]) for name, value in inputs.items()}
    loads: list[int] = []
    original = Streamer.load

    def counting(self: Streamer, slot: Any, region: Any, copies: Any = None) -> None:
        if isinstance(region, list):
            loads.append(len(region))
        original(self, slot, region, copies)

    monkeypatch.setattr(Streamer, "load", counting)
    counts = []
    for slots in (None, 100):
        model = StreamedModel(make_transformer("flux"), device="cpu")
        model._parts.staging._most = slots or model._parts.staging._most
        modulations = model.hoist(inputs)
        assert modulations is not None
        rows, record = modulations.rows(range(6)), model.record(6)
        model.evaluate(inputs, modulations=rows, record=record, record_rows=[(row, row) for row in range(6)])
        loads.clear()
        leg = Leg(inputs, torch.ones_like(inputs["hidden_states"]), (), rows, record)
        model.vjp([leg], params="deliver", sink=GradientDictionary())
        counts.append(len(loads))
        assert model._parts.staging._ring
        model.close()
    stages = (
        4  # 3 blocks and the head, of 6 microbatches: at most three loads each, and 4 for the modulation's gradients
    )
    assert counts[0] <= 3 * 6 * stages + stages
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_block_is_on_its_way_before_it_is_needed(
    every: int, make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StreamedModel(make_transformer("flux"), MemoryPlan(every=every, hoist=False), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    record = model.record(3)
    model.evaluate(inputs, record=record, record_rows=[(row, row) for row in range(3)])
    late: list[str] = []
    ahead: list[str] = []
    prefetch, ensure = Weights.prefetch, Weights._ensure

    def prefetching(self: Weights, unit: str) -> None:
        ahead.append(unit)
        prefetch(self, unit)
        ahead.remove(unit)

    def ensuring(self: Weights, slot: Any, unit: str) -> None:
        if slot.unit != unit and not ahead:
            late.append(unit)
        ensure(self, slot, unit)

    monkeypatch.setattr(Weights, "prefetch", prefetching)
    monkeypatch.setattr(Weights, "_ensure", ensuring)
    leg = Leg(inputs, torch.ones_like(inputs["hidden_states"]), record=record)
    model.vjp([leg], params="deliver", sink=GradientDictionary())
    assert not [unit for unit in late if "blocks" in unit or unit == "stem"]
    model.close()


def test_pieces_of_a_sum_take_turns_in_the_slots(make_transformer: Any, make_inputs: Any) -> None:
    """One is still on its way to the host while the next one is rounded."""
    model = StreamedModel(make_transformer("flux"), MemoryPlan(slots=3), device="cpu")
    taken = []
    for _ in range(4):
        with model.weights.scratch(torch.float32) as (slot, _flat):
            taken.append(id(slot))
    assert len(set(taken)) == 3
    assert taken[3] == taken[0]
    model.close()


def test_an_interrupted_product_can_be_tried_again(
    make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StreamedModel(make_transformer("flux"), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    cotangent = torch.ones_like(inputs["hidden_states"])
    model.vjp([Leg(inputs, cotangent)], params="deliver", sink=(expected := GradientDictionary()))
    advance, calls = Evaluation.advance, []

    def interrupted(self: Evaluation) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        advance(self)

    leg = Leg(inputs, cotangent, record_rows=[2, 0, 1])  # of no record: they mean nothing
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.vjp([leg])
    assert leg.record is None
    for _ in range(2):  # the second time from the record that the first one left
        model.vjp([leg], params="deliver", sink=(found := GradientDictionary()))
        assert all(torch.equal(found.grads[name], expected.grads[name]) for name in expected.grads)
        assert leg.record is not None
    model.close()


def test_legs_that_cannot_be_are_refused_before_anything_runs(make_transformer: Any, make_inputs: Any) -> None:
    model = StreamedModel(make_transformer("flux"), device="cpu")
    inputs = model_inputs("flux", make_inputs, dtype=torch.float32)
    none = {name: value if name[-4:] == "_ids" else value[:0] for name, value in inputs.items()}
    with pytest.raises(ValueError, match="at least one row"):
        model.evaluate(none)
    with pytest.raises(ValueError, match="no legs"):
        model.vjp([])
    for name in ("hiden_states", "guidance"):
        with pytest.raises(ValueError, match=name):
            model.vjp([Leg(inputs, inputs["hidden_states"], (name,))])
    model.close()


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"microbatch": 0}, "microbatch=0"), ({"slots": 1}, "slots=1"), ({"every": 0}, "every=0"),
     ({"resident": "some"}, "'some'"), ({"block_inputs": "disk"}, "'disk'")],
)  # fmt: skip
def test_plans_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryPlan(**setting)


def test_a_transformer_has_one_streamed_model_at_a_time(make_transformer: Any) -> None:
    transformer = make_transformer("flux")
    first = StreamedModel(transformer, device="cpu")
    with pytest.raises(ValueError, match=r"streamed already: close\(\)"):
        StreamedModel(transformer, device="cpu")
    first.close()
    StreamedModel(transformer, device="cpu").close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_a_gpu_gives_plain_autograds_gradients(
    home: str, plan: MemoryPlan, make_transformer: Any, make_inputs: Any, worst_error: Any
) -> None:
    """Streams and events in place of threads: values, both kinds of products and the drop-in, three times over."""
    inputs = {
        name: value.to(home) if isinstance(value, Tensor) else value
        for name, value in model_inputs("flux-guidance", make_inputs, dtype=torch.float32).items()
    }
    plain = make_transformer("flux-guidance").to("cuda")
    on_gpu = {name: value.to("cuda") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    cotangent = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(1))
    grads, input_grads = expected_products(plain, on_gpu, cotangent.to("cuda"), ("hidden_states",))
    expected = {name: gradient.cpu() for name, gradient in grads.items()}
    model = StreamedModel(make_transformer("flux-guidance"), plan, device="cuda")
    for _ in range(3):
        leg = Leg(inputs, cotangent.to(home), ("hidden_states",))
        model.vjp([leg], params="accumulate")
        (found,) = model.vjp([leg], params="deliver", sink=(sink := GradientDictionary()))
        twice = {name: 2 * gradient for name, gradient in expected.items()}
        assert worst_error(sink.grads, twice)[0] <= 1
        torch.testing.assert_close(
            found["hidden_states"].cpu(), input_grads["hidden_states"].cpu(), rtol=2e-5, atol=1e-5
        )
        model.zero_grad()
        model(**inputs, return_dict=False)[0].backward(cotangent.to(home))
        assert worst_error({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)[0] <= 1
    model.close()
