"""The world of `shapes`: sampled scenes satisfy their specs, and rendering is what the geometry says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leapalign.zoo.shapes.prompts import (
    PREFIXES,
    all_specs,
    phrase,
    sample_specs,
    train_prompts,
    validation_prompts,
    vocabulary,
)
from leapalign.zoo.shapes.scenes import (
    CATEGORIES,
    IMAGE_SIZE,
    SHAPES,
    Spec,
    coverage,
    object_coverage,
    render,
    sample_scenes,
)


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(0)
    specs, texts = sample_specs(600, generator)
    return specs, texts, sample_scenes(specs, generator)


def test_scenes_hold_what_the_specs_ask_for(drawn):
    specs, _, scenes = drawn
    assert scenes.present.sum(1).tolist() == [len(spec.objects) for spec in specs]
    for i, spec in enumerate(specs):
        assert [SHAPES[s] for s in scenes.shape[i, : len(spec.objects)]] == [shape for shape, _ in spec.objects]


def test_objects_lie_inside_the_picture_and_apart(drawn):
    _, _, scenes = drawn
    inside = object_coverage(scenes)
    reach = 1.42 * scenes.radius  # the largest extent of any shape
    for centre in (scenes.x, scenes.y):
        assert ((centre - reach >= -1e-4) & (centre + reach <= IMAGE_SIZE + 1e-4))[scenes.present].all()
    # A pixel is touched by two objects in their anti-aliased fringe at most.
    assert (inside.sum(1) <= 1.01).float().mean() > 0.9995


def test_rendering_is_seeded_and_in_range(drawn):
    specs, _, _ = drawn
    first, second = (render(sample_scenes(specs[:50], torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (50, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert first.min() >= 0 and first.max() <= 1


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_coverage_is_the_area_of_the_shape(shape):
    """Anti-aliased coverage sums to the exact area: a one-pixel ramp errs by O(1) pixel at corners."""
    r = 6.0
    area = [
        3.14159265 * r**2,
        (2 * 0.88 * r) ** 2,
        1.29903811 * (1.42 * r) ** 2,
        r**2 * (8 * 1.12 * 0.42 - 4 * 0.42**2),
    ]
    grid = torch.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2
    covered = coverage(torch.tensor(shape), grid[None, :] + 0.3, grid[:, None] - 0.2, torch.tensor(r)).sum()
    corners = (0, 4, 3, 12)[shape]
    assert abs(covered.item() - area[shape]) < 1.0 + 0.25 * corners


def test_prompts_split_without_overlap_and_cover_every_category():
    train, held_out = train_prompts(), validation_prompts()
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in held_out}
    for prompts in (train, held_out):
        counts = {c: sum(p["category"] == c for p in prompts) for c in CATEGORIES}
        assert len(set(counts.values())) == 1 and min(counts.values()) > 0


@settings(max_examples=60, deadline=None)
@given(category=st.sampled_from(CATEGORIES), index=st.integers(0, 10_000), prefix=st.sampled_from(PREFIXES))
def test_every_spec_survives_json_and_uses_known_words(category, index, prefix):
    specs = all_specs()[category]
    spec = specs[index % len(specs)]
    assert Spec.from_json(spec.to_json()) == spec
    assert set((prefix + phrase(spec)).split()) <= set(vocabulary())


def test_phrases_are_unique():
    texts = [phrase(spec) for specs in all_specs().values() for spec in specs]
    assert len(set(texts)) == len(texts)
