"""What a streamed model refuses, notices and copies, and in which order."""

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
from tests.engine.products import PLANS, expected_products, model_inputs


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
