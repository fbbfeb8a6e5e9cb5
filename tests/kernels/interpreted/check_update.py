"""The device's update with Triton equals torch's bit for bit; run by tests/engine/optimizer/test_update_kernels.py.

Blocks run in torch: what is compared is what the optimizer does with their gradients.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leapalign.engine.backbones import SequentialBackbone
from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.passes.evaluation import Leg
from leapalign.engine.plan import MemoryPlan
from leapalign.kernels import dispatch
from leapalign.kernels.adamw8bit import device as adamw8bit_triton
from leapalign.kernels.adamw8bit import kernel as adamw8bit_kernel

CPU = torch.device("cpu")
STEPS = 3
TERMS = 3
PLAN = MemoryPlan(kernels="torch")
# (rows, columns): pieces of several rows; of one row each, the last short; rows of which no whole blocks fit a slot
SHAPES = ((40, 64), (23, 256), (200, 19))
Gradients = dict[str, dict[str, Tensor | OuterProduct]]


def test_the_interpreter_runs_it() -> None:
    assert dispatch.INTERPRETED


class Chain(nn.Module):
    timestep_scale = 1.0

    def __init__(self, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(columns, rows) for rows, columns in shapes)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)


def model_of(shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, **options: Any) -> StreamedModel:
    chain = Chain(shapes, dtype)
    backbone = SequentialBackbone(
        chain, chain.blocks, stem=lambda m, inputs: (inputs["x"],), head=lambda m, carried, c: carried[0], device=CPU
    )
    return StreamedModel(backbone, PLAN, AdamW8bit(lr=1e-2, seed=2**63 + 5, **options))


def gradients_of(model: StreamedModel, step: int, dtype: torch.dtype) -> Gradients:
    """Matrices as factors, the left ones columns of something wider as the engine's are; vectors as they are."""
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found: Gradients = {}
    for unit, layout in model.store.units.items():
        gradients: dict[str, Tensor | OuterProduct] = {}
        for name, shape in layout.shapes.items():
            if len(shape) == 2:
                left = normal(TERMS, shape[0] + 5)[:, 2:-3].to(dtype)
                gradients[name] = OuterProduct(left, normal(TERMS, shape[1]).to(dtype))
            else:
                gradients[name] = normal(*shape)
        if gradients:
            found[unit] = gradients
    return found


def multiplied_out(gradients: Gradients) -> Gradients:
    """The same, dense."""
    return {
        unit: {
            name: adamw8bit_triton.expand(g.left, g.right) if isinstance(g, OuterProduct) else g
            for name, g in each.items()
        }
        for unit, each in gradients.items()
    }


def step(model: Any, gradients: Gradients) -> None:
    with model.optimizer.in_backward() as sink:
        for unit, each in gradients.items():
            sink(unit, each)


def snapshot(model: Any) -> dict[str, Tensor]:
    """Copies of every byte that a step may change, by name."""
    model.streamer.drain()
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        states = model.optimizer.state[parameter]
        found |= {f"{name}/{kind}": value.clone() for kind, value in states.items() if isinstance(value, Tensor)}
    return found


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [
        name for name in a if not torch.equal(a[name].view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8))
    ]


@pytest.mark.parametrize(
    ("dtype", "master", "ema_decay", "weight_decay", "clip"),
    [
        (torch.bfloat16, "stochastic", 0.9, 0.1, "block"),
        (torch.bfloat16, "stochastic", None, 0.0, "none"),
        (torch.bfloat16, "residual", 0.9, 0.0, "block"),
        (torch.bfloat16, "float32", None, 0.1, "block"),
        (torch.float32, "stochastic", 0.9, 0.1, "none"),
    ],
)
def test_the_bits_of_the_definition(
    dtype: torch.dtype,
    master: Any,
    ema_decay: float | None,
    weight_decay: float,
    clip: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"master": master, "ema_decay": ema_decay, "weight_decay": weight_decay, "clip": clip}
    options |= {"max_grad_norm": 0.5, "placement": "device"}
    launched, launch = [], adamw8bit_kernel.launch

    def counted(*given: Any) -> None:
        launched.append(given)
        launch(*given)

    monkeypatch.setattr(adamw8bit_kernel, "launch", counted)
    results = []
    for kernels in ("torch", "auto"):
        assert not launched
        model = model_of(SHAPES, dtype, kernels=kernels, **options)
        start = snapshot(model)
        for number in range(STEPS):
            step(model, gradients_of(model, number, dtype))
        results.append(snapshot(model))
        model.close()
    assert not differing(*results)
    assert len(differing(start, results[1])) == len(start), "every weight and state takes part"
    columns = [right.shape[1] for _, _, _, right, *_ in launched if right is not None]
    assert columns.count(64) >= STEPS and columns.count(256) > STEPS, "factors are not multiplied out; in pieces"
    assert 19 not in columns and len(launched) - len(columns) > 4 * STEPS, "else they are; and three biases"


def test_factors_are_the_gradient_that_they_multiply_out_to() -> None:
    results = []
    for change in (lambda gradients: gradients, multiplied_out):
        model = model_of(SHAPES, torch.bfloat16, placement="device", clip="none")
        step(model, change(gradients_of(model, 4, torch.bfloat16)))
        results.append(snapshot(model))
        model.close()
    assert not differing(*results)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["factor", "bias"])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, where: str) -> None:
    model = model_of(((40, 64),), torch.bfloat16, placement="device", clip="block", ema_decay=0.9)
    good = gradients_of(model, 5, torch.float32)
    step(model, good)
    before = snapshot(model)
    broken = gradients_of(model, 6, torch.float32)
    matrix, bias = broken["blocks.0"].values()
    assert isinstance(matrix, OuterProduct) and isinstance(bias, Tensor)
    (matrix.left if where == "factor" else bias[None])[0, 7] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        step(model, broken)
    assert not differing(before, snapshot(model)) and model.optimizer is not None
    assert (model.optimizer.steps, model.optimizer.skipped) == (1, 1)
    model.close()


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 90), columns=st.integers(1, 70), dense=st.booleans(), dtype=st.sampled_from(["bf16", "fp32"])
)
def test_any_shape(rows: int, columns: int, dense: bool, dtype: str) -> None:
    """Tails of pieces, of blocks and of programs."""
    results = []
    for kernels in ("torch", "triton"):
        of = torch.bfloat16 if dtype == "bf16" else torch.float32
        model = model_of(
            ((40, 64), (rows, columns)), of, kernels=kernels, placement="device", clip="block", ema_decay=0.5
        )
        gradients = gradients_of(model, 7, of)
        step(model, multiplied_out(gradients) if dense else gradients)
        results.append(snapshot(model))
        model.close()
    assert not differing(*results)


def test_a_clip_by_the_norm_of_all() -> None:
    """Gradients that waited in the weights' dtype."""
    results, norms = [], []
    for kernels in ("torch", "triton"):
        model = model_of(SHAPES, torch.bfloat16, kernels=kernels, placement="device", max_grad_norm=0.1)
        assert model.optimizer is not None
        gradients = [
            g for each in multiplied_out(gradients_of(model, 8, torch.float32)).values() for g in each.values()
        ]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert isinstance(gradient, Tensor)
            parameter.grad = gradient.to(torch.bfloat16)
        model.optimizer.step()
        results.append(snapshot(model))
        norms.append(model.optimizer.gradient_norm)
        model.close()
    assert not differing(*results)
    assert norms[0] == norms[1] > 0.1


def test_hoisted_modulation_of_a_transformer(
    make_transformer: Any, make_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors that a backward pass delivers; host and device."""
    outer, update_outer = [], adamw8bit_triton.update_outer

    def counted(weights: Tensor, *given: Any, **options: Any) -> None:
        outer.append(weights.shape)
        update_outer(weights, *given, **options)

    monkeypatch.setattr("leapalign.engine.optimizer.update.update_outer", counted)
    results = []
    latents, conditioning = make_inputs("flux", 2, torch.bfloat16)
    inputs = {"hidden_states": latents, "timestep": torch.tensor([0.9, 0.5]), **conditioning}
    for placement, kernels in (("host", "auto"), ("device", "torch"), ("device", "triton")):
        optimizer = AdamW8bit(lr=1e-2, clip="block", placement=placement, kernels=kernels)  # type: ignore[arg-type]
        model = StreamedModel(make_transformer("flux", torch.bfloat16), PLAN, optimizer, device="cpu")
        with optimizer.in_backward() as sink:
            model.vjp([Leg(inputs, torch.ones_like(latents) / 64)], params="deliver", sink=sink)
        assert bool(outer) == (kernels == "triton")
        results.append(snapshot(model))
        model.close()
    assert not differing(results[0], results[1]) and not differing(results[1], results[2])
