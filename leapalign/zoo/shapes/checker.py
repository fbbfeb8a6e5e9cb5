"""The rule-based judge of `shapes`: finds coloured objects in a picture and compares them with what a prompt asks for.

Nothing here is learned and nothing is shared with the reward model. A pixel belongs to a colour by its hue when its
chroma is high enough; connected pixels of one colour are an object; its shape is the one of the four whose
anti-aliased template of the same area and centre overlaps it best (soft intersection over union). An object that
matches no template well is unknown and makes the picture wrong, as does any object that was not asked for. This is
GenEval's logic on a world where detection can be exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.zoo.shapes.scenes import COLOUR_NAMES, IMAGE_SIZE, PALETTE, SHAPES, Spec, coverage

MIN_CHROMA = 0.22  # below: ground. Palette colours have 0.52-0.86
MIN_AREA = 5.0  # pixels; smaller specks are ignored. The smallest rendered object covers 36
MAX_AREA = 200.0  # pixels; rendered objects cover at most 121, and a larger one has no known shape
MIN_OVERLAP = 0.82  # soft IoU below which an object has no known shape; rendered ones reach 0.96 and more
WINDOW = 18  # pixels; objects reach at most 1.42 * 6 from their centre


@dataclass(frozen=True)
class Detected:
    """One object: colour and shape names (shape None: unknown), centre and area in pixels, template overlap."""

    colour: str
    shape: str | None
    x: float
    y: float
    area: float
    overlap: float


def _chromatic(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Chroma (max - min) and the grey-free direction of colours whose channels are in dimension 1."""
    direction = rgb - rgb.mean(1, keepdim=True)
    return rgb.amax(1) - rgb.amin(1), direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-6)


def segment(images: Tensor) -> tuple[Tensor, Tensor]:
    """Colour index (B, 32, 32), -1 on the ground, and chroma (B, 32, 32) of pictures (B, 3, 32, 32) in [0, 1]."""
    chroma, direction = _chromatic(images.float())
    _, palette = _chromatic(PALETTE)
    nearest = torch.einsum("bchw,nc->bnhw", direction, palette).argmax(1)
    return torch.where(chroma > MIN_CHROMA, nearest, -1), chroma


def _shift(t: Tensor, dy: int, dx: int, fill: int) -> Tensor:
    out = torch.full_like(t, fill)
    h, w = t.shape[-2:]
    out[..., max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = t[
        ..., max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return out


def connected_components(colour: Tensor) -> Tensor:
    """Component labels (B, 32, 32), -1 on the ground: 4-connected pixels of one colour share the largest flat index."""
    start = torch.arange(colour.numel()).reshape(colour.shape)
    label = torch.where(colour >= 0, start, -1)
    while True:
        grown = label
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            neighbour = _shift(grown, dy, dx, -1)
            same = _shift(colour, dy, dx, -1) == colour
            grown = torch.where(same & (colour >= 0), torch.maximum(grown, neighbour), grown)
        if torch.equal(grown, label):
            return label
        label = grown


def _classify(soft: Tensor, x: Tensor, y: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """Best template (index into SHAPES) and its soft IoU for objects with coverage `soft` (N, 32, 32)."""
    n = len(soft)
    # Area of each shape at radius 1, so that templates have the object's own area.
    unit = torch.tensor([3.14159, 4 * 0.88**2, 1.299 * 1.42**2, 8 * 1.12 * 0.42 - 4 * 0.42**2])
    scales = torch.tensor([0.92, 1.0, 1.08])
    offsets = torch.tensor([-0.5, 0.0, 0.5])
    shape = torch.arange(len(SHAPES)).view(1, -1, 1, 1, 1, 1, 1)
    radius = (area.view(-1, 1) / unit).sqrt().view(n, -1, 1, 1, 1, 1, 1) * scales.view(1, 1, -1, 1, 1, 1, 1)
    left, top = (
        (x - WINDOW / 2).round().clamp(0, IMAGE_SIZE - WINDOW),
        (y - WINDOW / 2).round().clamp(0, IMAGE_SIZE - WINDOW),
    )
    steps = torch.arange(WINDOW)
    rows, columns = top[:, None] + steps, left[:, None] + steps
    window = soft[torch.arange(n)[:, None, None], rows.long()[:, :, None], columns.long()[:, None, :]]
    dx = (columns + 0.5 - x[:, None]).view(n, 1, 1, 1, 1, 1, -1) - offsets.view(1, 1, 1, -1, 1, 1, 1)
    dy = (rows + 0.5 - y[:, None]).view(n, 1, 1, 1, 1, -1, 1) - offsets.view(1, 1, 1, 1, -1, 1, 1)
    template = coverage(shape, dx, dy, radius)  # (N, shapes, scales, offsets, offsets, WINDOW, WINDOW)
    seen = window.view(n, 1, 1, 1, 1, WINDOW, WINDOW)
    overlap = torch.minimum(template, seen).sum((-2, -1)) / torch.maximum(template, seen).sum((-2, -1))
    best = overlap.flatten(2).amax(2)
    value, index = best.max(1)
    return index, value


def detect(images: Tensor) -> list[list[Detected]]:
    """The objects in each picture of `images` (B, 3, 32, 32) in [0, 1], largest first.

    Raises ValueError for another size.
    """
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"images must be (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {tuple(images.shape)}; render at 32x32"
        )
    images = images.detach().float().cpu()
    colour, chroma = segment(images)
    label = connected_components(colour)
    found: list[list[Detected]] = [[] for _ in images]
    flat = label.flatten()
    roots = torch.unique(flat[flat >= 0])
    for chunk in roots.split(256):
        picture = chunk // IMAGE_SIZE**2
        mask = label[picture] == chunk[:, None, None]
        kept = mask.flatten(1).sum(1) >= MIN_AREA
        picture, mask = picture[kept], mask[kept]
        if not len(picture):
            continue
        # Edge pixels outside the mask still hold a part of the object: chroma says how much.
        near = mask.clone()
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            near |= _shift(mask, dy, dx, 0)
        tone = torch.where(mask, chroma[picture], 0).flatten(1).topk(int(MIN_AREA), 1).values.mean(1)
        unclaimed = near & (mask | (label[picture] < 0))
        soft = torch.where(unclaimed, (chroma[picture] / tone[:, None, None]).clamp(0, 1), 0)
        area = soft.sum((1, 2))
        centre = torch.arange(IMAGE_SIZE) + 0.5
        x, y = (soft * centre).sum((1, 2)) / area, (soft * centre[:, None]).sum((1, 2)) / area
        index, overlap = _classify(soft, x, y, area)
        names = colour[picture].flatten(1).gather(1, mask.flatten(1).int().argmax(1, keepdim=True))[:, 0]
        for i in range(len(picture)):
            shape = SHAPES[int(index[i])] if overlap[i] >= MIN_OVERLAP and area[i] <= MAX_AREA else None
            found[int(picture[i])].append(
                Detected(
                    COLOUR_NAMES[int(names[i])], shape, x[i].item(), y[i].item(), area[i].item(), overlap[i].item()
                )
            )
    return [sorted(objects, key=lambda o: -o.area) for objects in found]


def _related(first: Detected, second: Detected, relation: str) -> bool:
    """Whether `first` lies where `relation` says: by more than 3 pixels and more along that axis than across."""
    dx, dy = second.x - first.x, second.y - first.y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along > 3 and along >= across


def satisfies(objects: list[Detected], spec: Spec) -> bool:
    """Whether the objects are exactly those of the spec, in colour where it names one and in place where it says."""
    if len(objects) != len(spec.objects):
        return False
    left = list(objects)
    matched = []
    for shape, colour in spec.objects:
        match = next((o for o in left if o.shape == shape and colour in (None, o.colour)), None)
        if match is None:
            return False
        left.remove(match)
        matched.append(match)
    return spec.relation is None or _related(matched[0], matched[1], spec.relation)


def check(images: Tensor, specs: list[dict]) -> Tensor:
    """(B,) bool: whether each picture (B, 3, 32, 32) in [0, 1] shows exactly what its prompt's metadata asks for.

    `specs` are dictionaries as `Spec.to_json` makes them. Raises ValueError where the counts differ.
    """
    if len(images) != len(specs):
        raise ValueError(f"{len(images)} images but {len(specs)} specs; pass one spec an image")
    found = detect(images)
    return torch.tensor([satisfies(o, Spec.from_json(s)) for o, s in zip(found, specs, strict=True)], dtype=torch.bool)
