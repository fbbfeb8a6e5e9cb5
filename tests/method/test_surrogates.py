"""LeapAlign's legs, distances and weights against the paper's formulas, written out sample by sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from leapalign.kernels.leap.prediction import similarity_weights
from leapalign.method.leapalign import LeapAlign, leapalign2
from leapalign.method.trajectory import Trajectory

SIGMAS = [1.0, 0.9, 0.6, 0.25, 0.0]
PAIRS = torch.tensor([[0, 3], [1, 2], [2, 3]])


@pytest.fixture
def trajectory() -> Trajectory:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(5, 3, 2, 4, generator=generator, dtype=torch.float64)
    velocities = torch.randn(3, 2, 2, 4, generator=generator, dtype=torch.float64)
    return Trajectory(latents, torch.tensor(SIGMAS, dtype=torch.float64), PAIRS, velocities)


def test_legs_in_backward_order(trajectory: Trajectory) -> None:
    """c_j = -s_j g: the second leap goes to 0, so neither s_j - s_{j+1} nor its sign; c_k = -(s_k - s_j) y < 0."""
    surrogate = leapalign2(trajectory, PAIRS, LeapAlign(alpha=0.7))
    leg_j, leg_k = surrogate.legs
    assert torch.equal(leg_j.step, PAIRS[:, 1])
    assert torch.equal(leg_k.step, PAIRS[:, 0])
    assert leg_j.coefficient.tolist() == [-0.25, -0.6, -0.25]
    assert leg_k.coefficient.tolist() == [-(1.0 - 0.25), -(0.9 - 0.6), -(0.6 - 0.25)]
    assert surrogate.discount == 0.7


@pytest.mark.parametrize("tau", [1e-6, 0.1, 0.9, 50.0])
def test_distances_and_weights_sample_by_sample(trajectory: Trajectory, tau: float) -> None:
    surrogate = leapalign2(trajectory, PAIRS, LeapAlign(tau=tau))
    for b, (k, j) in enumerate(PAIRS.tolist()):
        x_k, x_j, x_0 = (trajectory.latents[i, b].flatten().tolist() for i in (k, j, 4))
        v_k, v_j = (trajectory.velocities[b, slot].flatten().tolist() for slot in (0, 1))
        d_j = sum(abs(to - (x - (SIGMAS[k] - SIGMAS[j]) * v)) for to, x, v in zip(x_j, x_k, v_k, strict=True)) / 8
        d_0 = sum(abs(to - (x - SIGMAS[j] * v)) for to, x, v in zip(x_0, x_j, v_j, strict=True)) / 8
        assert surrogate.d_j[b].item() == pytest.approx(d_j, rel=1e-14)
        assert surrogate.d_0[b].item() == pytest.approx(d_0, rel=1e-14)
        # each distance is clamped by itself, then they are added
        assert surrogate.weights[b].item() == pytest.approx(1 / (max(d_j, tau) + max(d_0, tau)), rel=1e-14)


def test_clamping_is_by_distance() -> None:
    d_j, d_0 = torch.tensor([0.0, 0.3, 0.02]), torch.tensor([0.5, 0.4, 0.03])
    expected = torch.tensor([1 / 0.6, 1 / 0.7, 1 / 0.2])
    torch.testing.assert_close(similarity_weights(d_j, d_0, 0.1), expected, rtol=1e-6, atol=0)


def test_paper_defaults() -> None:
    assert LeapAlign() == LeapAlign(alpha=0.3, tau=0.1, threshold=0.55)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alpha": -0.1}, "alpha=-0.1 must lie in"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"tau": math.inf}, "tau=inf"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"threshold": math.inf}, "threshold=inf"),
    ],
)
def test_refusals(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        LeapAlign(**setting)
    assert "\n" not in str(refusal.value)
