"""AdamW8bit over a streamed model: same bits wherever it runs, torch's optimizer interface, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.passes.evaluation import Leg
from leapalign.engine.plan import MemoryPlan
from leapalign.kernels.adamw8bit.definition import Hyper, update
from leapalign.kernels.adamw8bit.device import expand
from leapalign.kernels.adamw8bit.quantize import BLOCK

STEPS = 3
HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


def inputs_of(make_inputs: Any, dtype: torch.dtype = torch.bfloat16, step: int = 0) -> dict[str, Any]:
    latents, conditioning = make_inputs("flux", 2, dtype)
    return {"hidden_states": latents.roll(step, 0), "timestep": torch.tensor([0.9, 0.5]), **conditioning}


def made(make_transformer: Any, plan: MemoryPlan | None = None, dtype: Any = torch.bfloat16, **settings: Any) -> Any:
    return StreamedModel(make_transformer("flux", dtype), plan, AdamW8bit(**HYPER, **settings), device="cpu")


def snapshot(model: StreamedModel) -> dict[str, Tensor]:
    """Every byte that a step may change, by name."""
    optimizer: Any = model.optimizer
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        found |= {f"{names[id(parameter)]}/{k}": v.clone() for k, v in state.items() if isinstance(v, Tensor)}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(model: Any, make_inputs: Any, how: str) -> dict[str, Tensor]:
    """A few steps by loss.backward() and step(), in the backward pass, or from held sums."""
    dtype = model.store.dtype
    for step in range(STEPS):
        given = inputs_of(make_inputs, dtype, step)
        cotangent = torch.ones_like(given["hidden_states"]) / 64
        if how in ("grad", "fused"):
            model(**given, return_dict=False)[0].backward(cotangent)
            model.optimizer.step()
            model.optimizer.zero_grad()
        elif how == "held":
            model.vjp([Leg(given, cotangent)], params="accumulate")
            assert model.optimizer.step_from("held")
        else:
            with model.optimizer.in_backward() as sink:
                model.vjp([Leg(given, cotangent)], params="deliver", sink=sink)
    model.streamer.drain()
    return snapshot(model)


@pytest.mark.parametrize(
    ("how", "master"),
    [("grad", "residual"), ("held", "stochastic"), ("backward", "stochastic"), ("backward", "float32")],
)
def test_same_bits_wherever_the_update_runs(how: str, master: str, make_transformer: Any, make_inputs: Any) -> None:
    settings: dict[str, Any] = {"master": master, "ema_decay": 0.9, "clip": "block", "max_grad_norm": 0.05}
    results = []
    for placement, plan in (
        ("host", MemoryPlan()),
        ("device", MemoryPlan()),
        ("device", MemoryPlan(slots=3, microbatch=1, every=2)),
        ("host", MemoryPlan(slots=3, block_inputs="device", resident="all")),
    ):
        model = made(make_transformer, plan, placement=placement, **settings)
        before = snapshot(model)
        results.append(train(model, make_inputs, how))
        assert all(not torch.equal(before[n], results[0][n]) for n in before if n.endswith(("/m", "attn.to_q.weight")))
        model.close()
    assert all(same(results[0], other) for other in results[1:])


class KeptGradients:
    """A sink that keeps copies of gradients as they come, factors as factors."""

    on_host = True

    def __init__(self) -> None:
        self.grads: dict[str, Tensor | OuterProduct] = {}

    def __call__(self, unit: str, gradients: Any) -> None:
        for name, g in gradients.items():
            factors = isinstance(g, OuterProduct)
            self.grads[name] = OuterProduct(g.left.clone(), g.right.clone()) if factors else g.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", ["global", "block", "none"])
def test_a_step_is_the_kernel_applied_to_every_gradient(
    clip: str, dtype: torch.dtype, make_transformer: Any, make_inputs: Any
) -> None:
    """Literally: gradients from a dictionary, norms in float64, one kernel call a parameter. The same bits."""
    limit = 0.02
    model = made(make_transformer, dtype=dtype, clip=clip, max_grad_norm=limit, seed=7)
    given = inputs_of(make_inputs, dtype)
    cotangent = torch.ones_like(given["hidden_states"]) / 64
    model.vjp([Leg(given, cotangent)], params="deliver", sink=(sink := KeptGradients()))
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    hoisted = {name for unit in model.store.units.values() if unit.name.endswith("/modulation") for name in unit.shapes}
    # Sums wait in the weights' dtype, but those of hoisted linears as they are.
    held: dict[str, Tensor] = {}
    squares: dict[str, float] = {}
    for name, g in sink.grads.items():
        if isinstance(g, OuterProduct):
            held[name], squares[name] = expand(g.left, g.right), float(g.square_sum())
        else:
            held[name] = g if name in hoisted else g.to(dtype).float()
            squares[name] = float(held[name].double().square().sum())
    norms = {unit.name: math.sqrt(sum(squares[name] for name in unit.shapes)) for unit in model.store.units.values()}
    model.vjp([Leg(given, cotangent)], params="accumulate")
    assert model.optimizer.step_from("held")
    total = model.optimizer.gradient_norm
    assert total == pytest.approx(math.sqrt(sum(norm**2 for norm in norms.values())), rel=1e-13)
    for number, (name, weights) in enumerate(expected.items()):
        unit = next(unit for unit in model.store.units.values() if name in unit.shapes)
        norm = {"global": total, "block": norms[unit.name], "none": 0.0}[clip]
        n = weights.numel()
        moments = [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
        absmax = [torch.zeros(-(-n // BLOCK)) for _ in range(2)]
        hyper = Hyper(HYPER["lr"], 0.9, 0.999, 1e-8, HYPER["weight_decay"], 1)
        scale = min(1.0, limit / norm) if norm else 1.0
        update(
            weights.view(-1),
            held[name].view(-1),
            moments[0],
            absmax[0],
            moments[1],
            absmax[1],
            hyper,
            seed=7,
            parameter=number,
            scale=scale,
        )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    model.close()


@pytest.mark.parametrize("how", ["grad", "held", "backward"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(
    how: str, bad: float, make_transformer: Any, make_inputs: Any
) -> None:
    model = made(make_transformer, clip="block", ema_decay=0.9)
    train(model, make_inputs, how)
    before = snapshot(model)
    given = inputs_of(make_inputs)
    cotangent = torch.full_like(given["hidden_states"], bad)
    if how == "grad":
        model(**given, return_dict=False)[0].backward(cotangent)
        model.optimizer.step()
        model.zero_grad()
    elif how == "held":
        model.vjp([Leg(given, cotangent)], params="accumulate")
        assert not model.optimizer.step_from("held")
    else:
        with pytest.raises(FloatingPointError, match="not finite"), model.optimizer.in_backward() as sink:
            model.vjp([Leg(given, cotangent)], params="deliver", sink=sink)
    assert same(before, snapshot(model))
    assert (model.optimizer.steps, model.optimizer.skipped) == (STEPS, 1)
    train(model, make_inputs, how)
    assert (model.optimizer.steps, model.optimizer.skipped) == (2 * STEPS, 1)
    model.close()


def test_states_are_saved_and_loaded_in_place(make_transformer: Any, make_inputs: Any, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"master": "residual", "ema_decay": 0.9}
    straight = made(make_transformer, **settings)
    train(straight, make_inputs, "grad")
    train(straight, make_inputs, "grad")
    first = made(make_transformer, **settings)
    train(first, make_inputs, "grad")
    torch.save({"optimizer": first.optimizer.state_dict(), "model": first.state_dict()}, tmp_path / "state")
    second = made(make_transformer, **settings)
    saved = torch.load(tmp_path / "state")
    second.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    train(second, make_inputs, "grad")
    assert same(snapshot(straight), snapshot(second))
    assert second.optimizer.steps == 2 * STEPS
    other = made(make_transformer)
    with pytest.raises(ValueError, match="residual"):
        other.optimizer.load_state_dict(saved["optimizer"])
    for model in (straight, first, second, other):
        model.close()


def test_groups_and_schedulers(make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer("flux", torch.bfloat16)
    blocks = list(transformer.single_transformer_blocks.parameters())
    still = list(transformer.proj_out.parameters())
    optimizer = AdamW8bit([{"params": blocks, "lr": 1e-2}, {"params": still, "lr": 0.0}], lr=1.0)
    model = StreamedModel(transformer, None, optimizer, device="cpu")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = snapshot(model)
    train(model, make_inputs, "grad")
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5e-2, 0.0]
    after = snapshot(model)
    for name, _ in model.named_parameters():
        moved = not torch.equal(before[name], after[name])
        assert moved == name.startswith("single_transformer_blocks.")
    model.close()


def test_what_does_not_fit_is_refused(make_transformer: Any) -> None:
    for settings, message in (
        ({"lr": -1.0}, "lr=-1.0"), ({"betas": (0.9, 1.0)}, "betas"), ({"eps": 0.0}, "eps"), ({"clip": "all"}, "clip="),
        ({"ema_decay": 1.0}, "ema_decay"), ({"master": "bf16"}, "master"), ({"placement": "disk"}, "placement"),
        ({"kernels": "cuda"}, "kernels="),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            AdamW8bit(**settings)
    with pytest.raises(ValueError, match="float64"):
        made(make_transformer, dtype=torch.float64)
    with pytest.raises(ValueError, match="requires grad"):
        StreamedModel(make_transformer("flux").requires_grad_(False), None, AdamW8bit(), device="cpu")
    with pytest.raises(ValueError, match="not the model's"):
        StreamedModel(make_transformer("flux"), None, AdamW8bit([torch.nn.Parameter(torch.ones(3))]), device="cpu")
    model = made(make_transformer)
    with pytest.raises(ValueError, match="has a model already"):
        StreamedModel(make_transformer("flux"), None, model.optimizer, device="cpu")
    with pytest.raises(ValueError, match="step_from"), model.optimizer.in_backward():
        pass
    model.close()


# ---- inside loss.backward() ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["host", "device"])
def test_fused_backward_has_the_bits_of_the_sink_and_holds_no_gradient(
    placement: str, make_transformer: Any, make_inputs: Any
) -> None:
    settings: dict[str, Any] = {"clip": "block", "max_grad_norm": 0.05, "placement": placement, "ema_decay": 0.9}
    model = made(make_transformer, fused_backward=True, **settings)
    found = train(model, make_inputs, "fused")
    assert same(found, train(made(make_transformer, **settings), make_inputs, "backward"))
    assert (model.optimizer.steps, model.optimizer.skipped) == (STEPS, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.store.holds("grad") and not model.store.holds("held")


def test_fused_backward_gives_input_gradients_too(make_transformer: Any, make_inputs: Any) -> None:
    gradients = []
    for fused in (True, False):
        model = made(make_transformer, clip="none", fused_backward=fused)
        given = inputs_of(make_inputs)
        given["hidden_states"].requires_grad_()
        model(**given, return_dict=False)[0].float().square().sum().backward()
        gradients.append(given["hidden_states"].grad)
    assert torch.equal(*gradients)


def test_fused_backward_skips_what_is_not_finite_and_goes_on(make_transformer: Any, make_inputs: Any) -> None:
    model = made(make_transformer, clip="none", fused_backward=True)
    before, given = snapshot(model), inputs_of(make_inputs)
    model(**given, return_dict=False)[0].backward(torch.full_like(given["hidden_states"], math.nan))
    model.optimizer.step()
    assert same(snapshot(model), before)
    assert (model.optimizer.steps, model.optimizer.skipped) == (0, 1)
    model.optimizer.step()  # no backward since
    assert (model.optimizer.steps, model.optimizer.skipped) == (0, 1)
    train(model, make_inputs, "fused")
    assert model.optimizer.steps == STEPS and not same(snapshot(model), before)


def test_fused_backward_takes_one_pass_a_step(make_transformer: Any, make_inputs: Any) -> None:
    model = made(make_transformer, clip="block", fused_backward=True)
    given = inputs_of(make_inputs)
    first = model(**given, return_dict=False)[0].sum()
    first.backward()
    second = model(**given, return_dict=False)[0].sum()
    with pytest.raises(RuntimeError, match="one backward pass a step"):
        second.backward()
    model.optimizer.step()
    assert model.optimizer.steps == 1
    with pytest.raises(ValueError, match="clip='global'"):
        AdamW8bit(fused_backward=True)


def test_a_fused_pass_that_fails_before_an_update_is_no_step(
    make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(make_transformer, clip="block", fused_backward=True)
    before, given = snapshot(model), inputs_of(make_inputs)
    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "vjp", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError):
            model(**given, return_dict=False)[0].sum().backward()
    assert model.optimizer.steps == 0 and same(snapshot(model), before)
    train(model, make_inputs, "fused")
    assert model.optimizer.steps == STEPS
