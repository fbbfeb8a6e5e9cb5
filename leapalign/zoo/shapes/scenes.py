"""The world of `shapes`: what a picture may hold, how scenes are sampled from a prompt, and how they are rendered.

A picture is 32x32 RGB in [0, 1]: up to four non-overlapping objects (four shapes, five colours) on a light grey ground.
A `Spec` says what a prompt asks for in one of GenEval's six categories; `sample_scenes` draws scenes that satisfy it
and `render` draws them with anti-aliased edges from signed distances. Everything is batched and seeded by a generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 32  # pixels a side
MAX_OBJECTS = 4
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.86, 0.14, 0.14),
    "green": (0.14, 0.66, 0.24),
    "blue": (0.14, 0.32, 0.88),
    "yellow": (0.96, 0.82, 0.10),
    "purple": (0.62, 0.18, 0.74),
}
COLOUR_NAMES = tuple(COLOURS)
PALETTE = torch.tensor(list(COLOURS.values()))  # (5, 3)
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "attribute_binding")

# Half extents as multiples of an object's radius, chosen so that the four shapes cover about the same area.
SQUARE_HALF = 0.88
TRIANGLE_RADIUS = 1.42
CROSS_ARM, CROSS_HALF_WIDTH = 1.12, 0.42


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for: `objects` are (shape, colour or None); `relation` holds between objects 0 and 1."""

    category: str
    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None

    def to_json(self) -> dict:
        """The spec as prompt metadata (plain dictionaries and lists)."""
        objects = [{"shape": shape, "colour": colour} for shape, colour in self.objects]
        return {"category": self.category, "objects": objects, "relation": self.relation}

    @staticmethod
    def from_json(data: dict) -> Spec:
        """The inverse of `to_json`; further keys are ignored."""
        objects = tuple((item["shape"], item["colour"]) for item in data["objects"])
        return Spec(data["category"], objects, data.get("relation"))


@dataclass
class Scenes:
    """A batch of scenes; every tensor is (B, MAX_OBJECTS) but `background` (B,) and `tint` (B, MAX_OBJECTS, 3)."""

    shape: Tensor  # int64 index into SHAPES
    colour: Tensor  # int64 index into COLOURS
    x: Tensor  # float32 pixels, centre
    y: Tensor  # float32 pixels, downward
    radius: Tensor  # float32 pixels
    present: Tensor  # bool
    background: Tensor  # float32 grey level
    tint: Tensor  # float32 offset added to the object's colour

    def __len__(self) -> int:
        return self.shape.shape[0]

    def take(self, index: Tensor) -> Scenes:
        """The scenes at `index` (int64 or bool), in that order."""
        return Scenes(**{name: value[index] for name, value in vars(self).items()})


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _relation_holds(x: Tensor, y: Tensor, relation: Tensor) -> Tensor:
    """Whether object 0 lies where `relation` (index into RELATIONS, -1 for none) says, clearly and along one axis."""
    dx, dy = x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]
    along = torch.stack([dx, -dx, dy, -dy], 1).gather(1, relation.clamp(min=0)[:, None])[:, 0]
    across = torch.where(relation < 2, dy, dx).abs()
    return (relation < 0) | ((along > 7) & (across < 0.75 * along))


def _place(count: Tensor, relation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Centres and radii of non-overlapping objects by rejection: every scene that fails is drawn again."""
    batch = count.shape[0]
    x, y, radius = (torch.zeros(batch, MAX_OBJECTS) for _ in range(3))
    todo = torch.arange(batch)
    while len(todo):
        n = len(todo)
        crowded = (count[todo] > 2)[:, None]
        r = torch.where(
            crowded, _uniform((n, MAX_OBJECTS), 3.6, 4.4, generator), _uniform((n, MAX_OBJECTS), 4.4, 6.0, generator)
        )
        reach = TRIANGLE_RADIUS * r
        px = reach + (IMAGE_SIZE - 2 * reach) * torch.rand(n, MAX_OBJECTS, generator=generator)
        py = reach + (IMAGE_SIZE - 2 * reach) * torch.rand(n, MAX_OBJECTS, generator=generator)
        distance = ((px[:, :, None] - px[:, None]) ** 2 + (py[:, :, None] - py[:, None]) ** 2).sqrt()
        clearance = 1.2 * (r[:, :, None] + r[:, None]) + 1.0
        used = torch.arange(MAX_OBJECTS) < count[todo][:, None]
        pair = used[:, :, None] & used[:, None] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool)
        good = ~((distance < clearance) & pair).flatten(1).any(1) & _relation_holds(px, py, relation[todo])
        x[todo[good]], y[todo[good]], radius[todo[good]] = px[good], py[good], r[good]
        todo = todo[~good]
    return x, y, radius


def sample_scenes(specs: list[Spec], generator: torch.Generator) -> Scenes:
    """Scenes that show exactly what each spec asks for; colours left open are drawn uniformly.

    Returns B = len(specs) scenes on the CPU, a function of `specs` and the generator's state alone.
    """
    batch = len(specs)
    shape = torch.zeros(batch, MAX_OBJECTS, dtype=torch.int64)
    colour = torch.randint(len(COLOURS), (batch, MAX_OBJECTS), generator=generator)
    for b, spec in enumerate(specs):
        for i, (name, colour_name) in enumerate(spec.objects):
            shape[b, i] = SHAPES.index(name)
            if colour_name is not None:
                colour[b, i] = COLOUR_NAMES.index(colour_name)
    count = torch.tensor([len(spec.objects) for spec in specs])
    relation = torch.tensor([RELATIONS.index(spec.relation) if spec.relation else -1 for spec in specs])
    x, y, radius = _place(count, relation, generator)
    return Scenes(
        shape=shape,
        colour=colour,
        x=x,
        y=y,
        radius=radius,
        present=torch.arange(MAX_OBJECTS) < count[:, None],
        background=_uniform((batch,), 0.82, 0.98, generator),
        tint=_uniform((batch, MAX_OBJECTS, 3), -0.05, 0.05, generator),
    )


def signed_distance(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels (negative inside) of offsets (dx, dy) to objects of the given shape and radius.

    All arguments broadcast; `shape` indexes SHAPES. Exact at straight edges; near corners it is a bound from below,
    which is all that anti-aliasing needs.
    """
    circle = (dx**2 + dy**2).sqrt() - radius
    square = torch.maximum(dx.abs(), dy.abs()) - SQUARE_HALF * radius
    slanted = 0.8660254 * dx.abs() - 0.5 * dy  # the two upper edges of an upright equilateral triangle
    triangle = torch.maximum(slanted, dy) - 0.5 * TRIANGLE_RADIUS * radius
    arm, width = CROSS_ARM * radius, CROSS_HALF_WIDTH * radius
    bar = torch.maximum(dx.abs() - arm, dy.abs() - width)
    cross = torch.minimum(bar, torch.maximum(dx.abs() - width, dy.abs() - arm))
    index = torch.broadcast_to(shape, circle.shape)
    return torch.where(index == 0, circle, torch.where(index == 1, square, torch.where(index == 2, triangle, cross)))


def coverage(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Share of each pixel that the object covers, in [0, 1]: a one-pixel ramp over its signed distance."""
    return (0.5 - signed_distance(shape, dx, dy, radius)).clamp(0, 1)


def object_coverage(scenes: Scenes) -> Tensor:
    """(B, MAX_OBJECTS, 32, 32) coverage of every object, 0 where it is absent."""
    centre = torch.arange(IMAGE_SIZE) + 0.5
    dx = centre[None, None, None, :] - scenes.x[:, :, None, None]
    dy = centre[None, None, :, None] - scenes.y[:, :, None, None]
    inside = coverage(scenes.shape[:, :, None, None], dx, dy, scenes.radius[:, :, None, None])
    return inside * scenes.present[:, :, None, None]


def compose(inside: Tensor, scenes: Scenes) -> Tensor:
    """Paint objects with coverage `inside` (B, MAX_OBJECTS, 32, 32) over the ground: (B, 3, 32, 32) in [0, 1]."""
    paint = (PALETTE[scenes.colour] + scenes.tint).clamp(0, 1)  # (B, MAX_OBJECTS, 3)
    image = scenes.background[:, None, None, None].expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
    for i in range(MAX_OBJECTS):
        alpha = inside[:, i, None]
        image = image * (1 - alpha) + alpha * paint[:, i, :, None, None]
    return image


def render(scenes: Scenes) -> Tensor:
    """Pictures (B, 3, 32, 32) float32 in [0, 1]."""
    return compose(object_coverage(scenes), scenes)
