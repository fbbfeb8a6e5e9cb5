"""Ways from a wrong picture to a right one: the last part of the reward's training, which gives it a slope to climb.

After contrastive training alone the score first falls on the way from a blue square to a red one (mixed colours are
negatives), so its gradient at the wrong picture points away from the right one, and alignment has nothing to climb.
Here an edited scene is wrong for a text that is true of the original, and every cross-fade between the two is asked
to score in between, in proportion. Where the edit leaves the text true (another colour where none is named) both must
score the same: a reward with favourite colours makes alignment paint everything in them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leapalign.zoo.shapes.reward import TwoTower
from leapalign.zoo.shapes.scenes import COLOUR_NAMES, SHAPES, Scenes, render


def edited(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """Each scene with one thing changed: colours drawn anew or swapped, one object's shape, or two shapes swapped."""
    n = len(scenes)
    kind = torch.rand(n, generator=generator)[:, None]
    swapped_colour = torch.cat([scenes.colour[:, :2].flip(1), scenes.colour[:, 2:]], 1)
    shift = torch.randint(1, len(COLOUR_NAMES), scenes.colour.shape, generator=generator)
    colour = torch.where(kind < 0.25, (scenes.colour + shift) % len(COLOUR_NAMES), scenes.colour)
    several = scenes.present[:, 1:2]
    colour = torch.where((kind >= 0.25) & (kind < 0.5) & several, swapped_colour, colour)
    other = scenes.shape.clone()
    other[:, 0] = (other[:, 0] + torch.randint(1, len(SHAPES), (n,), generator=generator)) % len(SHAPES)
    swapped_shape = torch.cat([scenes.shape[:, :2].flip(1), scenes.shape[:, 2:]], 1)
    shape = torch.where((kind >= 0.5) & (kind < 0.75), other, scenes.shape)
    shape = torch.where((kind >= 0.75) & several, swapped_shape, shape)
    return Scenes(**{**vars(scenes), "colour": colour, "shape": shape})


def path_loss(
    model: TwoTower, images: Tensor, scenes: Scenes, texts: Tensor, still_true: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared deviation from the straight line of scores, and between pictures of which the text is as true.

    Args:
        images: (B, 3, 32, 32) of which the texts are true.
        scenes: the B edited scenes.
        texts: (B, width) embeddings; no gradient flows into them.
        still_true: (B,) bool, whether the text is true of the edited scene.
    """
    share = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    wrong = render(scenes).to(images.device)
    pictures = model.embed_images(torch.cat([wrong, images, (1 - share) * wrong + share * images]))
    start, end, middle = (pictures.view(3, len(images), -1) * texts.detach()).sum(-1)
    line = ((1 - share[:, 0, 0, 0]) * start + share[:, 0, 0, 0] * end).detach()
    return torch.where(
        still_true.to(images.device), F.mse_loss(start, end, reduction="none"), (middle - line) ** 2
    ).mean()
