"""Which attribute belongs to which object: a second task that both towers of the reward share in training.

Contrastive learning is slow to bind (a red circle and a blue square, or the other way round; left, or right), because
in its loss a wrong owner is one negative among hundreds. So one linear head, the same for pictures and texts, reads the
facts off either embedding: which coloured shapes there are, and which shape lies where of which. That puts the two
towers' bound facts in one place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leapalign.zoo.shapes.scenes import COLOUR_NAMES, RELATIONS, SHAPES, Scenes, Spec

COLOURED = len(SHAPES) * len(COLOUR_NAMES)
PLACED = len(SHAPES) ** 2 * len(RELATIONS)


@dataclass(frozen=True)
class Facts:
    """What is known of N pictures or texts; a row of which a kind of fact says nothing is masked for that kind."""

    coloured: Tensor  # (N, COLOURED) 1 where that coloured shape is there
    placed: Tensor  # (N, PLACED) 1 where the first shape lies so of the second
    knows_colours: Tensor  # (N,) bool
    knows_places: Tensor  # (N,) bool


def facts_of_scenes(scenes: Scenes) -> Facts:
    """Facts of pictures; places are known of two objects of different shapes."""
    n = len(scenes)
    coloured = F.one_hot(scenes.shape * len(COLOUR_NAMES) + scenes.colour, COLOURED) * scenes.present[..., None]
    placed = torch.zeros(n, len(SHAPES), len(SHAPES), len(RELATIONS))
    rows = torch.arange(n)
    for first, second in ((0, 1), (1, 0)):
        dx, dy = scenes.x[:, second] - scenes.x[:, first], scenes.y[:, second] - scenes.y[:, first]
        along, across = torch.stack([dx, -dx, dy, -dy], 1), torch.stack([dy, dy, dx, dx], 1).abs()
        placed[rows, scenes.shape[:, first], scenes.shape[:, second]] = ((along > 3) & (along >= across)).float()
    two = (scenes.present.sum(1) == 2) & (scenes.shape[:, 0] != scenes.shape[:, 1])
    return Facts(coloured.amax(1).float(), placed.flatten(1), torch.ones(n, dtype=torch.bool), two)


def facts_of_specs(specs: list[Spec]) -> Facts:
    """Facts of texts: what the prompt says, and what it implies (a left of b: b right of a)."""
    coloured = torch.zeros(len(specs), COLOURED)
    placed = torch.zeros(len(specs), len(SHAPES), len(SHAPES), len(RELATIONS))
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for row, spec in enumerate(specs):
        for shape, colour in spec.objects:
            if colour is not None:
                coloured[row, SHAPES.index(shape) * len(COLOUR_NAMES) + COLOUR_NAMES.index(colour)] = 1
        if spec.relation:
            a, b = (SHAPES.index(shape) for shape, _ in spec.objects)
            placed[row, a, b, RELATIONS.index(spec.relation)] = 1
            placed[row, b, a, RELATIONS.index(inverse[spec.relation])] = 1
    has_place = torch.tensor([spec.relation is not None for spec in specs])
    return Facts(coloured, placed.flatten(1), coloured.any(1), has_place)


class ConceptHead(nn.Module):
    """Reads facts off unit embeddings (N, width) of pictures or texts; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, COLOURED + PLACED)

    def loss(self, embeddings: Tensor, facts: Facts) -> Tensor:
        """Binary cross-entropy summed over facts, averaged over the rows that know them. () float32."""
        logits = self.read(10 * embeddings).split([COLOURED, PLACED], 1)  # 10: unit vectors have entries of about 0.1
        kinds = ((logits[0], facts.coloured, facts.knows_colours), (logits[1], facts.placed, facts.knows_places))
        total = embeddings.new_zeros(())
        for found, truth, known in kinds:
            errors = F.binary_cross_entropy_with_logits(found, truth.to(found.device), reduction="none").sum(1)
            total = total + (errors * known.to(found.device)).sum() / known.sum().clamp(min=1)
        return total
