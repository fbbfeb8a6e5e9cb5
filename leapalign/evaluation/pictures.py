"""Pictures to look at: grids of samples, and the same samples before and after alignment, with captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_TILE = 128  # pixels; smaller pictures are enlarged without smoothing
LARGEST_TILE = 384
GAP = 6
LINE = 16  # height of a line of text
CAPTION = 2 * LINE
PAPER, INK, FAINT = "white", "black", "#666666"


def to_image(picture: Tensor) -> Image.Image:
    """A (3, H, W) picture in [0, 1] as an 8-bit image of the same size."""
    bytes_ = (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().cpu().numpy())


def tile(picture: Tensor) -> Image.Image:
    """A picture at a size to look at: small ones enlarged by a whole factor, large ones reduced."""
    image = to_image(picture)
    longest = max(image.size)
    if longest < SMALLEST_TILE:
        factor = -(-SMALLEST_TILE // longest)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST_TILE, LARGEST_TILE), Image.Resampling.LANCZOS)
    return image


def grid(pictures: Tensor, captions: Sequence[str], *, columns: int = 4) -> Image.Image:
    """(N, 3, H, W) pictures in [0, 1], N >= 1, row by row, each over its caption."""
    tiles = [tile(picture) for picture in pictures]
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = _sheet(columns * (width + GAP) + GAP, rows * (height + CAPTION + GAP) + GAP)
    for i, (image, caption) in enumerate(zip(tiles, captions, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + CAPTION + GAP)
        sheet.paste(image, (x, y))
        _write(sheet, caption, x, y + height, width)
    return sheet


def before_after(
    before: Tensor, after: Tensor, prompts: Sequence[str], notes: Sequence[tuple[str, str]], *, columns: int = 3
) -> Image.Image:
    """Pairs of pictures from the same noise, left before and right after alignment.

    Args:
        before, after: (N, 3, H, W) in [0, 1], N >= 1.
        prompts: the pairs' prompts.
        notes: what to write under the left and the right picture of each pair, e.g. the rewards.
    """
    lefts, rights = [tile(p) for p in before], [tile(p) for p in after]
    width, height = lefts[0].size
    pair, block = 2 * width + 2 * GAP, height + LINE + CAPTION + GAP
    columns = min(columns, len(lefts))
    sheet = _sheet(columns * (pair + 2 * GAP), -(-len(lefts) // columns) * block + LINE + GAP)
    for column in range(columns):
        x = 2 * GAP + column * (pair + 2 * GAP)
        _write(sheet, "before", x, 0, width, lines=1, colour=FAINT)
        _write(sheet, "after", x + width + GAP, 0, width, lines=1, colour=FAINT)
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        x, y = 2 * GAP + i % columns * (pair + 2 * GAP), LINE + i // columns * block
        for offset, image, note in ((0, left, notes[i][0]), (width + GAP, right, notes[i][1])):
            sheet.paste(image, (x + offset, y))
            _write(sheet, note, x + offset, y + height, width, lines=1, colour=FAINT)
        _write(sheet, prompts[i], x, y + height + LINE, pair - GAP)
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG under its name only when it is whole, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    image.save(draft, format="PNG")
    draft.replace(path)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _sheet(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)


def _write(image: Image.Image, text: str, x: int, y: int, width: int, *, lines: int = 2, colour: str = INK) -> None:
    """Text of at most `lines` lines within `width` pixels from (x, y) down; what is too long is cut."""
    font, draw = _font(), ImageDraw.Draw(image)
    characters = max(8, int(width / (draw.textlength("abcdefghij", font=font) / 10)))
    wrapped = textwrap.wrap(text, characters, max_lines=lines, placeholder=" …")
    for number, line in enumerate(wrapped):
        draw.text((x, y + 1 + number * LINE), line, fill=colour, font=font)
