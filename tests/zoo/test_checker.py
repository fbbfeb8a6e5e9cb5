"""The rule-based checker: right on rendered scenes, and never fooled by a scene that differs in one thing."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from leapalign.zoo.shapes import checker
from leapalign.zoo.shapes.pretraining.corruptions import blank, melted, odd_coloured, two_toned
from leapalign.zoo.shapes.pretraining.train_reward import SpecTable, hard_negatives
from leapalign.zoo.shapes.prompts import all_specs, sample_specs
from leapalign.zoo.shapes.scenes import CATEGORIES, COLOUR_NAMES, SHAPES, Scenes, Spec, render, sample_scenes


@pytest.fixture(scope="module")
def rendered():
    generator = torch.Generator().manual_seed(1)
    specs, _ = sample_specs(500, generator)
    scenes = sample_scenes(specs, generator)
    return specs, scenes, render(scenes)


def test_right_on_rendered_scenes_in_every_category(rendered):
    specs, _, images = rendered
    right = checker.check(images, [spec.to_json() for spec in specs])
    by_category = defaultdict(list)
    for spec, ok in zip(specs, right.tolist(), strict=True):
        by_category[spec.category].append(ok)
    assert set(by_category) == set(CATEGORIES)
    for name, verdicts in by_category.items():
        assert sum(verdicts) / len(verdicts) > 0.97, name


def test_detection_finds_shape_colour_and_place(rendered):
    _, scenes, images = rendered
    for i, found in enumerate(checker.detect(images[:100])):
        truth = scenes.take(torch.tensor([i]))
        n = int(truth.present.sum())
        assert len(found) == n
        for o in range(n):
            x, y = truth.x[0, o].item(), truth.y[0, o].item()
            near = min(found, key=lambda d: (d.x - x) ** 2 + (d.y - y) ** 2)
            assert (near.shape, near.colour) == (SHAPES[truth.shape[0, o]], COLOUR_NAMES[truth.colour[0, o]])
            # The triangle's centroid is its centre; anti-aliasing moves none by more than a fraction of a pixel.
            assert abs(near.x - x) < 0.3 and abs(near.y - y) < 0.3


def test_refuses_hard_negatives(rendered):
    """Scene truth from the scene's own numbers: the checker on pictures must agree on prompts one change away."""
    specs, scenes, images = rendered
    disagreements = total = 0
    for i in range(120):
        wrong = hard_negatives(specs[i])
        truth = SpecTable(wrong).true_of(scenes.take(torch.tensor([i])))[0]
        seen = checker.check(images[i : i + 1].expand(len(wrong), -1, -1, -1), [w.to_json() for w in wrong])
        disagreements += int((truth != seen).sum())
        total += len(wrong)
    assert disagreements <= 0.03 * total


@pytest.mark.parametrize("corruption", [melted, odd_coloured, two_toned, blank])
def test_corrupted_pictures_are_wrong(corruption, rendered):
    """Most are: some melted shapes still resemble one, and a colour half way to grey may keep its hue."""
    specs, scenes, images = rendered
    index = torch.arange(200)
    broken = corruption(scenes.take(index), torch.Generator().manual_seed(2))
    metadata = [spec.to_json() for spec in specs[:200]]
    right = checker.check(broken, metadata).float().mean()
    limit = {melted: 0.25, odd_coloured: 0.75, two_toned: 0.05, blank: 0.0}[corruption]
    assert right <= limit
    assert right < checker.check(images[:200], metadata).float().mean()


def test_extra_object_and_stray_speck():
    spec = Spec("colors", (("square", "blue"),))
    one = sample_scenes([spec], torch.Generator().manual_seed(0))
    two = sample_scenes(
        [Spec("attribute_binding", (("square", "blue"), ("circle", "red")))], torch.Generator().manual_seed(0)
    )
    assert checker.check(render(one), [spec.to_json()]).item()
    assert not checker.check(render(two), [spec.to_json()]).item()
    specked = render(one)
    corner = specked[0, :, :2, :2] if one.x[0, 0] > 16 else specked[0, :, :2, -2:]
    corner.copy_(torch.tensor([0.9, 0.1, 0.1])[:, None, None])  # 4 red pixels: below MIN_AREA
    assert checker.check(specked, [spec.to_json()]).item()


def test_relations_follow_the_picture():
    generator = torch.Generator().manual_seed(5)
    for spec in all_specs()["position"][:12]:
        scene = sample_scenes([spec], generator)
        swapped = Scenes(**{**vars(scene), "x": scene.x.flip(1).roll(2, 1), "y": scene.y.flip(1).roll(2, 1)})
        assert checker.check(render(scene), [spec.to_json()]).item()
        assert not checker.check(render(swapped), [spec.to_json()]).item()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="2 images but 1 specs"):
        checker.check(torch.zeros(2, 3, 32, 32), [all_specs()["colors"][0].to_json()])
    with pytest.raises(ValueError, match=r"must be \(B, 3, 32, 32\)"):
        checker.detect(torch.zeros(2, 3, 64, 64))
