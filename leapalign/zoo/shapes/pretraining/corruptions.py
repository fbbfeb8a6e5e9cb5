"""Pictures that no prompt should like: negatives which teach the reward what broken looks like.

Without them alignment finds melted shapes and colour mixtures that score high. Every function takes rendered scenes or
pictures and a generator and returns pictures (B, 3, 32, 32) in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leapalign.zoo.shapes.scenes import (
    COLOURS,
    IMAGE_SIZE,
    MAX_OBJECTS,
    PALETTE,
    SHAPES,
    Scenes,
    compose,
    object_coverage,
    signed_distance,
)


def _rand(shape: tuple[int, ...], generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture blended with another one of the batch, 35-65%."""
    share = _rand((len(images), 1, 1, 1), generator, 0.35, 0.65)
    return share * images + (1 - share) * images[torch.randperm(len(images), generator=generator)]


def melted(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Objects half way between two shapes and bent by a smooth random displacement."""
    centre = torch.arange(IMAGE_SIZE) + 0.5
    bend = F.interpolate(_rand((len(scenes), 2, 4, 4), generator, -3, 3), size=IMAGE_SIZE, mode="bicubic")[:, :, None]
    dx = centre[None, None, None, :] - scenes.x[:, :, None, None] + bend[:, 0]
    dy = centre[None, None, :, None] - scenes.y[:, :, None, None] + bend[:, 1]
    radius = scenes.radius[:, :, None, None]
    other = (scenes.shape + torch.randint(1, len(SHAPES), scenes.shape.shape, generator=generator)) % len(SHAPES)
    first = signed_distance(scenes.shape[:, :, None, None], dx, dy, radius)
    second = signed_distance(other[:, :, None, None], dx, dy, radius)
    inside = (0.5 - 0.5 * (first + second)).clamp(0, 1) * scenes.present[:, :, None, None]
    return compose(inside, scenes)


def odd_coloured(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Objects painted half way between two colours, or half way to grey."""
    n = len(scenes)
    other = (scenes.colour + torch.randint(1, len(COLOURS), (n, MAX_OBJECTS), generator=generator)) % len(COLOURS)
    grey = _rand((n, MAX_OBJECTS, 1), generator, 0.2, 0.7).expand(-1, -1, 3)
    target = torch.where(_rand((n, MAX_OBJECTS, 1), generator) < 0.5, PALETTE[other], grey)
    share = _rand((n, MAX_OBJECTS, 1), generator, 0.4, 0.65)
    return compose(
        object_coverage(scenes), Scenes(**{**vars(scenes), "tint": share * (target - PALETTE[scenes.colour])})
    )


def two_toned(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Objects split into two colours along a line through their centres."""
    n = len(scenes)
    centre = torch.arange(IMAGE_SIZE) + 0.5
    angle = _rand((n, MAX_OBJECTS, 1, 1), generator, 0, 6.2832)
    dx, dy = centre - scenes.x[:, :, None, None], centre[:, None] - scenes.y[:, :, None, None]
    side = (0.5 + dx * angle.cos() + dy * angle.sin()).clamp(0, 1)
    other = (scenes.colour + torch.randint(1, len(COLOURS), (n, MAX_OBJECTS), generator=generator)) % len(COLOURS)
    inside = object_coverage(scenes)
    repainted = compose(inside, Scenes(**{**vars(scenes), "colour": other}))
    weight = (inside * side).amax(1, keepdim=True)
    return compose(inside, scenes) * (1 - weight) + repainted * weight


def blank(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """One flat colour, grey or a palette colour, with faint noise."""
    n = len(scenes)
    flat = PALETTE[torch.randint(len(COLOURS), (n,), generator=generator)]
    flat = torch.where(_rand((n, 1), generator) < 0.5, flat, _rand((n, 1), generator).expand(-1, 3))
    noise = 0.03 * torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return (flat[:, :, None, None] + noise).clamp(0, 1)


def washed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast raised until channels clip, lowered to a haze, or the ground darkened."""
    n = len(images)
    gain = torch.where(_rand((n, 1, 1, 1), generator) < 0.5, _rand((n, 1, 1, 1), generator, 2.0, 4.0), 0.3)
    return ((images - 0.5) * gain + _rand((n, 1, 1, 1), generator, 0.3, 0.7)).clamp(0, 1)


def corrupt(scenes: Scenes, images: Tensor, generator: torch.Generator) -> Tensor:
    """All corruptions in equal shares over the batch; `images` are the scenes rendered."""
    makers = [
        lambda s, i: mixed(i, generator),
        lambda s, i: melted(s, generator),
        lambda s, i: odd_coloured(s, generator),
        lambda s, i: two_toned(s, generator),
        lambda s, i: blank(s, generator),
        lambda s, i: washed(i, generator),
    ]
    parts = torch.arange(len(images)).chunk(len(makers))
    return torch.cat([make(scenes.take(p), images[p]) for make, p in zip(makers, parts, strict=False)])
