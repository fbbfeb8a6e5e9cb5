"""The average against float64, its bits on a swap, and its refusal of a decay that is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leapalign.engine.optimizer.average import EMA


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in (("a", (7, 3)), ("b", (5,)))}


@settings(max_examples=25, deadline=None)
@given(decay=st.floats(0, 0.9999), dtype=st.sampled_from([torch.float32, torch.bfloat16]), steps=st.integers(1, 12))
def test_the_average_is_the_recursion_in_float64(decay: float, dtype: torch.dtype, steps: int) -> None:
    start = weights(0, dtype)
    ema = EMA(start, decay)
    expected = {name: w.double() for name, w in start.items()}
    largest = {name: w.double().abs() for name, w in start.items()}
    for step in range(1, steps + 1):
        now = weights(step, dtype)
        ema.update(now)
        for name, w in now.items():
            expected[name] = decay * expected[name] + (1 - decay) * w.double()
            largest[name] = torch.maximum(largest[name], w.double().abs())
    for name, average in ema.tensors.items():
        assert average.dtype == torch.float32
        # A step rounds difference, product and sum: at most 4 half-ulps of values below 2 max|w|.
        bound = steps * 8 * 2**-24 * largest[name] + 1e-12
        assert ((average.double() - expected[name]).abs() <= bound).all()


def test_weights_that_stand_still_stay_exactly() -> None:
    still = weights(1)
    ema = EMA(still, 0.995)
    for _ in range(50):
        ema.update(still)
    assert all(torch.equal(ema.tensors[name], still[name]) for name in still)


def test_bfloat16_weights_move_the_average_by_less_than_bfloat16_can_tell() -> None:
    ema = EMA({"w": torch.ones(1, dtype=torch.bfloat16)}, 0.995)
    ema.update({"w": torch.full((1,), 1.0078125, dtype=torch.bfloat16)})  # the next bfloat16 number
    assert 1 < float(ema.tensors["w"]) < 1.0001


def test_swapping_gives_the_average_and_then_every_bit_back() -> None:
    model = torch.nn.Linear(4, 3)
    parameters = dict(model.named_parameters())
    ema = EMA(parameters, 0.9)
    with torch.no_grad():
        model.weight.mul_(1.7)
    ema.update(parameters)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    average = {name: t.clone() for name, t in ema.tensors.items()}

    def fail_inside() -> None:
        with ema.swapped(parameters):
            assert all(torch.equal(parameters[name], average[name]) for name in average)
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        fail_inside()
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    assert all(torch.equal(ema.tensors[name], average[name]) for name in average)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        EMA({}, decay)
