"""What a set of scored pictures says: means with standard errors, accuracy by category, colour entropy.

Pictures of one prompt are not independent, so every standard error is taken over prompts: of the prompts' own means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; the error is None where a single prompt cannot give one."""

    mean: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.error is None else f"{self.mean:.3f} ± {self.error:.3f}"

    def percent(self) -> str:
        """The same in per cent, e.g. `54.2 ± 2.9 %`."""
        error = "" if self.error is None else f" ± {100 * self.error:.1f}"
        return f"{100 * self.mean:.1f}{error} %"


def estimate(values: Tensor) -> Estimate:
    """Mean of (prompts, images) values, bool or float, and its standard error over prompts."""
    means = values.double().mean(1)
    count = len(means)
    error = float(means.std(correction=1)) / math.sqrt(count) if count > 1 else None
    return Estimate(float(means.mean()), error)


def by_category(values: Tensor, categories: Sequence[str]) -> dict[str, Estimate]:
    """`estimate` of the prompts of each category, in the order in which categories first appear.

    Args:
        values: (prompts, images).
        categories: one a prompt.
    """
    names = list(dict.fromkeys(categories))
    return {name: estimate(values[[i for i, c in enumerate(categories) if c == name]]) for name in names}


def entropy_bits(labels: Iterable[str]) -> float | None:
    """Shannon entropy, in bits, of the labels' frequencies; None without labels."""
    counts = Counter(labels)
    total = sum(counts.values())
    if not total:
        return None
    return abs(sum(n / total * math.log2(n / total) for n in counts.values()))


def is_scene(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt's metadata says what the rule-based checker needs: a category and the objects asked for."""
    return "category" in metadata and "objects" in metadata


def check_scenes(images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> tuple[Tensor, list[str]]:
    """The rule-based verdict on pictures of `shapes` scenes.

    Args:
        images: (B, 3, 32, 32) in [0, 1].
        metadata: one a picture, as `is_scene` wants it.

    Returns:
        (B,) bool, whether each picture shows what its prompt asks for; and the colours of all objects found in the
        pictures whose prompt names no colour. Their entropy falls when alignment collapses on few colours.
    """
    from leapalign.zoo.shapes import checker

    correct = checker.check(images, [dict(entry) for entry in metadata])
    free = [i for i, entry in enumerate(metadata) if all(item["colour"] is None for item in entry["objects"])]
    found = checker.detect(images[torch.tensor(free, dtype=torch.int64)]) if free else []
    return correct, [item.colour for objects in found for item in objects]
