"""The prompts of `shapes`: a small grammar over GenEval's six categories, split into training and held-out prompts."""

from __future__ import annotations

import hashlib
import itertools

import torch

from leapalign.zoo.shapes.scenes import CATEGORIES, COLOUR_NAMES, RELATIONS, SHAPES, Spec

PREFIXES = ("", "draw ", "paint ", "show ")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
HELD_OUT_PERCENT = 25
VALIDATION_PER_CATEGORY = 16
# Position and attribute binding are learned last and have the most prompts: pretraining draws them more often.
PRETRAINING_SHARES = {
    "single_object": 0.08,
    "two_object": 0.14,
    "counting": 0.16,
    "colors": 0.10,
    "position": 0.24,
    "attribute_binding": 0.28,
}


def _noun(shape: str, colour: str | None) -> str:
    return f"a {shape}" if colour is None else f"a {colour} {shape}"


def phrase(spec: Spec) -> str:
    """The spec in words, without a prefix: "a circle left of a square", "three crosses", ..."""
    if spec.category == "counting":
        return f"{NUMBERS[len(spec.objects)]} {PLURALS[spec.objects[0][0]]}"
    nouns = [_noun(*item) for item in spec.objects]
    return f" {spec.relation} ".join(nouns) if spec.relation else " and ".join(nouns)


def all_specs() -> dict[str, list[Spec]]:
    """Every spec of the world by category, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    colours = list(itertools.permutations(COLOUR_NAMES, 2))
    specs = {
        "single_object": [Spec("single_object", ((s, None),)) for s in SHAPES],
        "two_object": [Spec("two_object", ((a, None), (b, None))) for a, b in pairs],
        "counting": [Spec("counting", ((s, None),) * n) for s in SHAPES for n in NUMBERS],
        "colors": [Spec("colors", ((s, c),)) for s in SHAPES for c in COLOUR_NAMES],
        "position": [Spec("position", ((a, None), (b, None)), r) for a, b in pairs for r in RELATIONS],
        "attribute_binding": [
            Spec("attribute_binding", ((a, c), (b, d))) for a, b in pairs for c, d in colours
        ],
    }  # fmt: skip
    assert tuple(specs) == CATEGORIES
    return specs


def vocabulary() -> list[str]:
    """All words that the grammar can produce, sorted."""
    texts = [phrase(spec) for specs in all_specs().values() for spec in specs] + list(PREFIXES)
    return sorted({word for text in texts for word in text.split()})


def _held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 100 < HELD_OUT_PERCENT


def _prompts(held_out: bool) -> dict[str, list[dict]]:
    """Prompts with their metadata by category; the split goes by a hash of the whole text, prefix included."""
    split: dict[str, list[dict]] = {}
    for category, specs in all_specs().items():
        texts = [(prefix + phrase(spec), spec) for spec in specs for prefix in PREFIXES]
        split[category] = [{"prompt": t, **spec.to_json()} for t, spec in texts if _held_out(t) == held_out]
    return split


def _balanced(split: dict[str, list[dict]], per_category: int) -> list[dict]:
    """`per_category` prompts of every category, spread evenly over its list (which is repeated where it is short)."""
    chosen = []
    for prompts in split.values():
        order = sorted(prompts, key=lambda p: hashlib.sha256(p["prompt"].encode()).digest())
        chosen += [order[i % len(order)] for i in range(per_category)]
    return chosen


def train_prompts() -> list[dict]:
    """The alignment prompts: all six categories in equal shares, none of them held out."""
    return _balanced(_prompts(held_out=False), per_category=80)


def validation_prompts() -> list[dict]:
    """The held-out prompts: the same number from each category, texts that alignment never sees."""
    return _balanced(_prompts(held_out=True), per_category=VALIDATION_PER_CATEGORY)


def sample_specs(batch: int, generator: torch.Generator) -> tuple[list[Spec], list[str]]:
    """Specs and prompt texts for pretraining, categories drawn by PRETRAINING_SHARES."""
    specs = all_specs()
    weights = torch.tensor([PRETRAINING_SHARES[c] for c in CATEGORIES])
    category = torch.multinomial(weights, batch, replacement=True, generator=generator).tolist()
    draw = torch.rand(batch, 2, generator=generator).tolist()
    chosen = [
        specs[CATEGORIES[c]][int(u * len(specs[CATEGORIES[c]]))] for c, (u, _) in zip(category, draw, strict=True)
    ]
    texts = [PREFIXES[int(v * len(PREFIXES))] + phrase(s) for s, (_, v) in zip(chosen, draw, strict=True)]
    return chosen, texts
