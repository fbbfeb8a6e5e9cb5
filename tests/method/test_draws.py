"""Draws are functions of (seed, step, sample) alone, and have the distributions they should."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leapalign.method.draws import draw_noise, draw_prompts, draw_steps, random_pairs, sample_generator, unrank_pairs
from leapalign.method.leapalign import LeapAlign

KEYS = st.integers(min_value=0, max_value=2**40)


def test_unranking_visits_every_unordered_pair_once() -> None:
    for num_steps in (2, 3, 25):
        pairs = unrank_pairs(torch.arange(num_steps * (num_steps - 1) // 2), num_steps).tolist()
        assert sorted(map(tuple, pairs)) == list(combinations(range(num_steps), 2))


@pytest.mark.parametrize("source", ["draw_steps", "random_pairs"])
def test_pairs_are_uniform(source: str) -> None:
    """Chi-square over the 15 unordered pairs of 6 steps: 14 degrees of freedom, 36.12 is the 99.9% quantile."""
    draws = 3000
    if source == "draw_steps":
        pairs = torch.cat([draw_steps(LeapAlign(), 7, step, range(30), 6) for step in range(draws // 30)])
    else:
        pairs = random_pairs(draws, 6, torch.Generator().manual_seed(7))
    observed = torch.bincount(pairs[:, 0] * 6 + pairs[:, 1], minlength=36)
    counts = torch.tensor([observed[k * 6 + j] for k, j in combinations(range(6), 2)], dtype=torch.float64)
    assert counts.sum() == draws  # so k < j everywhere
    expected = draws / 15
    assert ((counts - expected) ** 2 / expected).sum() < 36.12


@settings(max_examples=20, deadline=None)
@given(seed=KEYS, step=KEYS, samples=st.lists(KEYS, min_size=1, max_size=4), num_steps=st.integers(2, 30))
def test_a_sample_does_not_see_its_batch(seed: int, step: int, samples: list[int], num_steps: int) -> None:
    noise, pairs = draw_noise(seed, step, samples, (3, 2)), draw_steps(LeapAlign(), seed, step, samples, num_steps)
    for row, sample in enumerate(samples):
        assert torch.equal(draw_noise(seed, step, [sample], (3, 2))[0], noise[row])
        assert torch.equal(draw_steps(LeapAlign(), seed, step, [sample], num_steps)[0], pairs[row])


def test_no_draw_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    draw_noise(0, 1, [2, 3], (4,))
    draw_steps(LeapAlign(), 0, 1, [2, 3], 25)
    draw_prompts(0, 1, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_neighbouring_keys_and_streams_are_unrelated() -> None:
    """Correlations of independent normals of 20000 elements stay below 4.5 / sqrt(20000) = 0.032 (p < 1e-5 each)."""
    shape = (20000,)
    rows = [draw_noise(*key, shape)[0] for key in [(0, 0, [0]), (1, 0, [0]), (0, 1, [0]), (0, 0, [1]), (0, 1, [1])]]
    rows.append(torch.randn(shape, generator=sample_generator(0, 0, 0, "pairs")))
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.032
    assert torch.stack(rows).mean(1).abs().max() < 0.032
    assert (torch.stack(rows).var(1) - 1).abs().max() < 4.5 * (2 / 20000) ** 0.5


def test_pinned_values() -> None:
    """A run's draws must not change with a release: resumed runs and published seeds depend on them."""
    assert draw_steps(LeapAlign(), 0, 1, [0, 1, 2, 3], 25).tolist() == [[6, 15], [2, 16], [7, 10], [8, 23]]
    assert draw_prompts(0, 1, 4, 10) == [3, 5, 7, 6]
    noise = torch.tensor([0.0569593, -0.9301183, 1.4114537, 1.6735004])
    # the last bits of a normal may depend on the CPU's vector instructions
    torch.testing.assert_close(draw_noise(0, 1, [0], (64,))[0, :4], noise, rtol=1e-5, atol=1e-5)


def test_shapes_and_dtypes() -> None:
    noise, pairs = draw_noise(0, 0, [5, 9], (6, 4)), draw_steps(LeapAlign(), 0, 0, [5, 9], 4)
    assert noise.shape == (2, 6, 4)
    assert noise.dtype == torch.float32
    assert pairs.shape == (2, 2)
    assert pairs.dtype == torch.int64
    assert draw_noise(0, 0, [], (6, 4)).shape == (0, 6, 4)
    assert draw_steps(LeapAlign(), 0, 0, [], 4).shape == (0, 2)


@settings(max_examples=30, deadline=None)
@given(seed=KEYS, batch=st.integers(1, 9), num_prompts=st.integers(1, 12))
def test_prompts_come_in_shuffled_epochs(seed: int, batch: int, num_prompts: int) -> None:
    steps = 3 * num_prompts  # whole epochs: 3 * num_prompts * batch positions
    order = [index for step in range(steps) for index in draw_prompts(seed, step, batch, num_prompts)]
    for epoch in range(3 * batch):
        assert sorted(order[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(range(num_prompts))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(draw_prompts(seed, epoch, 20, 20)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_steps(LeapAlign(), 0, 0, [0], 1), "num_steps=1"),
        (lambda: random_pairs(1, 0, torch.Generator()), "num_steps=0"),
        (lambda: draw_prompts(0, 0, 0, 5), "batch=0"),
        (lambda: draw_prompts(0, 0, 5, 0), "num_prompts=0"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
