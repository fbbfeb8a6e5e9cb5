"""Stage 4 of pretraining: the two-tower reward, contrastively, with hard and corrupted negatives.

Which texts are true of which scene is known exactly, so every entry of the picture-text matrix gets its true label (a
text of another sample that happens to be true is a positive). Each sample adds hard negative texts: swapped
attributes, inverted relations, other counts. Half of the pictures are the autoencoder's reconstructions, since those
are what the reward will see.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from leapalign.zoo.shapes.pretraining.concepts import ConceptHead, facts_of_scenes, facts_of_specs
from leapalign.zoo.shapes.pretraining.corruptions import corrupt
from leapalign.zoo.shapes.pretraining.paths import edited, path_loss
from leapalign.zoo.shapes.pretraining.progress import Progress, load_state, save_state
from leapalign.zoo.shapes.pretraining.train_autoencoder import load_autoencoder
from leapalign.zoo.shapes.prompts import NUMBERS, phrase, sample_specs
from leapalign.zoo.shapes.reward import WIDTH, TwoTower, save_reward, word_ids
from leapalign.zoo.shapes.scenes import CATEGORIES, COLOUR_NAMES, RELATIONS, SHAPES, Scenes, Spec, render, sample_scenes

BATCH = 80
CORRUPTED = 28  # further pictures of a batch that are wrong for every text
HARD = 2  # hard negative texts a sample
STEPS = 2600
PATHS_FROM = 2000 / 2600  # share of the steps after which cross-fades are asked to score in between
PATH_WEIGHT = 100.0  # squared cosines of 0.1 are worth as much as the other terms
LEARNING_RATE = 1e-3
POOL = 60_000  # scenes
NOISED = 12_000  # decoded from noised latents: what an unfinished sampler would show


def hard_negatives(spec: Spec) -> list[Spec]:
    """Specs one change away from `spec`: each differs in exactly one thing that the prompt says."""
    items, category = spec.objects, spec.category
    others = [s for s in SHAPES if s not in {shape for shape, _ in items}]
    if category == "single_object":
        return [Spec(category, ((s, None),)) for s in others] + [Spec("counting", items * 2)]
    if category == "two_object":
        return [Spec(category, (items[0], (s, None))) for s in others] + [Spec("single_object", items[:1])]
    if category == "counting":
        counts = [Spec(category, items[:1] * n) for n in NUMBERS if n != len(items)]
        return counts + [Spec(category, ((s, None),) * len(items)) for s in others]
    if category == "colors":
        (shape, colour) = items[0]
        recoloured = [Spec(category, ((shape, c),)) for c in COLOUR_NAMES if c != colour]
        return recoloured + [Spec(category, ((s, colour),)) for s in others]
    if category == "position":
        turned = [Spec(category, items, r) for r in RELATIONS if r != spec.relation]
        return [*turned, Spec(category, (items[1], items[0]), spec.relation)]
    (a, c), (b, d) = items
    swapped = [Spec(category, ((a, d), (b, c)))] * 3
    recoloured = [Spec(category, ((a, c), (b, e))) for e in COLOUR_NAMES if e not in (c, d)]
    return swapped + recoloured + [Spec(category, ((a, c), (s, d))) for s in others]


class SpecTable:
    """Specs as tensors, so that truth for a whole scene-by-text matrix is a few comparisons."""

    def __init__(self, specs: list[Spec]) -> None:
        shapes = torch.zeros(len(specs), len(SHAPES))
        exact = torch.zeros(len(specs), len(SHAPES) * len(COLOUR_NAMES))
        for i, spec in enumerate(specs):
            for shape, colour in spec.objects:
                s = SHAPES.index(shape)
                shapes[i, s] += 1
                if colour is not None:
                    exact[i, s * len(COLOUR_NAMES) + COLOUR_NAMES.index(colour)] += 1
        self.shapes, self.exact, self.coloured = shapes, exact, exact.sum(1) > 0
        self.relation = torch.tensor([RELATIONS.index(s.relation) if s.relation else -1 for s in specs])
        self.first = torch.tensor([SHAPES.index(s.objects[0][0]) for s in specs])
        self.second = torch.tensor([SHAPES.index(s.objects[-1][0]) for s in specs])

    def true_of(self, scenes: Scenes) -> Tensor:
        """(B, N) bool: whether text n is true of scene b, by the checker's rules applied to the scene itself."""
        shape_count = (F.one_hot(scenes.shape, len(SHAPES)) * scenes.present[..., None]).sum(1).float()
        both = scenes.shape * len(COLOUR_NAMES) + scenes.colour
        exact_count = (F.one_hot(both, self.exact.shape[1]) * scenes.present[..., None]).sum(1).float()
        right = (shape_count[:, None] == self.shapes).all(-1)
        right &= ~self.coloured | (exact_count[:, None] == self.exact).all(-1)
        at = (F.one_hot(scenes.shape, len(SHAPES)) * scenes.present[..., None]).float()  # (B, objects, shapes)
        x, y = (at * scenes.x[..., None]).sum(1), (at * scenes.y[..., None]).sum(1)  # (B, shapes), one object a shape
        dx, dy = x[:, self.second] - x[:, self.first], y[:, self.second] - y[:, self.first]
        along = torch.stack([dx, -dx, dy, -dy]).gather(0, self.relation.clamp(min=0).expand(1, len(x), -1))[0]
        across = torch.where(self.relation < 2, dy, dx).abs()
        return right & ((self.relation < 0) | ((along > 3) & (along >= across)))


@torch.no_grad()
def make_pool(vae: AutoencoderKL, work: Path, seed: int, device: str) -> dict:
    """Scenes, rendered and reconstructed pictures (uint8), and pictures decoded from noised latents; kept in `work`."""
    file = work / f"reward-pool-{seed}.pt"
    if not file.exists():
        generator = torch.Generator().manual_seed(seed + 2)
        batches = []
        for _ in range(POOL // 5000):
            batches.append(sample_scenes(sample_specs(5000, generator)[0], generator))
        scenes = Scenes(**{k: torch.cat([vars(b)[k] for b in batches]) for k in vars(batches[0])})
        rendered: list[Tensor] = []
        rebuilt: list[Tensor] = []
        noised: list[Tensor] = []
        for index in torch.arange(POOL).split(250):
            images = render(scenes.take(index))
            latents = vae.encode(images.to(device) * 2 - 1).latent_dist.mean
            rendered.append((images * 255).round().to(torch.uint8))
            rebuilt.append(_to_bytes(vae.decode(latents).sample))
            if len(noised) * 250 < NOISED:
                t = (0.2 + 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator)).to(device)
                scale = 1 / vae.config.scaling_factor
                noise = vae.config.shift_factor + scale * torch.randn(latents.shape, generator=generator).to(device)
                noised.append(_to_bytes(vae.decode((1 - t) * latents + t * noise).sample))
        pool = {
            "scenes": vars(scenes),
            "rendered": torch.cat(rendered),
            "rebuilt": torch.cat(rebuilt),
            "noised": torch.cat(noised),
        }
        torch.save(pool, file)
    return torch.load(file, weights_only=True)


def _to_bytes(decoded: Tensor) -> Tensor:
    return ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def true_specs(scenes: Scenes, generator: torch.Generator) -> list[Spec]:
    """For every scene a random spec that is true of it; positions only where one axis clearly dominates."""
    dx, dy = (scenes.x[:, 1] - scenes.x[:, 0]).tolist(), (scenes.y[:, 1] - scenes.y[:, 0]).tolist()
    draws = torch.rand(len(scenes), generator=generator).tolist()
    counts = scenes.present.sum(1).tolist()
    rows = zip(scenes.shape.tolist(), scenes.colour.tolist(), counts, dx, dy, draws, strict=True)
    return [_true_spec([SHAPES[k] for k in s[:n]], [COLOUR_NAMES[k] for k in c[:n]], *rest) for s, c, n, *rest in rows]


def _true_spec(shapes: list[str], colours: list[str], dx: float, dy: float, draw: float) -> Spec:
    if len(shapes) == 1:
        return Spec("colors", ((shapes[0], colours[0]),)) if draw < 0.7 else Spec("single_object", ((shapes[0], None),))
    if len(set(shapes)) == 1:
        return Spec("counting", ((shapes[0], None),) * len(shapes))
    plain = tuple((s, None) for s in shapes)
    clear = abs(dx) > 1.34 * abs(dy) or abs(dy) > 1.34 * abs(dx)
    if draw < 0.55 and clear and draw > 0.1:
        relation = ("left of" if dx > 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy > 0 else "below")
        return Spec("position", plain, relation)
    if draw <= 0.1 or colours[0] == colours[1]:
        return Spec("two_object", plain)
    return Spec("attribute_binding", tuple(zip(shapes, colours, strict=True)))


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 200 steps and a cosine to 0; then, for the paths, linear from a third to 0."""
    first = round(PATHS_FROM * steps)
    if step >= first:
        return LEARNING_RATE / 3 * (steps - step) / (steps - first)
    return LEARNING_RATE * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / first))


def train(work: Path, seed: int, device: str, steps: int = STEPS) -> None:
    """Train (or go on training) the reward; leaves `work`/reward.pt and, when done, `work`/reward/ for the package."""
    pool = make_pool(load_autoencoder(work, device), work, seed, device)
    scenes = Scenes(**pool["scenes"])
    torch.manual_seed(seed)
    model, concepts = TwoTower().to(device), ConceptHead(WIDTH).to(device)
    parameters = [*model.parameters(), *concepts.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    state_file = work / "reward.pt"
    progress = Progress("reward", steps)
    start = load_state(state_file, model=model, concepts=concepts, optimizer=optimizer, progress=progress)
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        images, batch, specs = make_batch(pool, scenes, generator)
        labels = F.pad(SpecTable(specs).true_of(batch), (0, 0, 0, CORRUPTED))  # corrupted pictures: nothing is true
        pictures = model.embed_images(images.to(device))
        texts = model.embed_texts(word_ids([phrase(spec) for spec in specs]).to(device))
        logits = model.log_scale.exp() * (pictures @ texts.T) + model.bias
        sign = labels.to(device).float() * 2 - 1
        contrast = -F.logsigmoid(sign * logits).sum() / len(images)
        binding = concepts.loss(pictures[:BATCH], facts_of_scenes(batch)) + concepts.loss(texts, facts_of_specs(specs))
        loss = contrast + binding
        if step >= round(PATHS_FROM * steps):
            turned = edited(batch, generator)
            still_true = SpecTable(specs[:BATCH]).true_of(turned).diagonal()
            loss = loss + PATH_WEIGHT * path_loss(
                model, images[:BATCH].to(device), turned, texts[:BATCH], still_true, generator
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.show(step + 1, contrast=contrast.item(), binding=binding.item(), loss=loss.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(state_file, step + 1, model=model, concepts=concepts, optimizer=optimizer, progress=progress)
            print(f"reward {step + 1}: {measure(model, pool, scenes, device)}", flush=True)
    save_reward(model, work / "reward", measure(model, pool, scenes, device))


def make_batch(pool: dict, scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Scenes, list[Spec]]:
    """Pictures (BATCH + CORRUPTED, 3, 32, 32), the scenes of the first BATCH, and (1 + HARD) * BATCH texts' specs."""
    index = torch.randint(POOL - 2000, (BATCH,), generator=generator)
    batch = scenes.take(index)
    specs = true_specs(batch, generator)
    for spec in list(specs):
        wrong = hard_negatives(spec)
        specs += [wrong[j] for j in torch.randint(len(wrong), (HARD,), generator=generator).tolist()]
    use_rebuilt = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.6
    images = torch.where(use_rebuilt, pool["rebuilt"][index], pool["rendered"][index]).float() / 255
    drawn = CORRUPTED * 6 // 7
    broken = corrupt(batch.take(torch.arange(drawn)), images[:drawn], generator)
    noised = pool["noised"][torch.randint(NOISED, (CORRUPTED - drawn,), generator=generator)].float() / 255
    everything = torch.cat([images, broken, noised])
    strength = 0.03 * torch.rand(len(everything), 1, 1, 1, generator=generator)
    return (everything + strength * torch.randn(everything.shape, generator=generator)).clamp(0, 1), batch, specs


@torch.no_grad()
def measure(model: TwoTower, pool: dict, scenes: Scenes, device: str) -> dict:
    """What the reward can tell on 2,000 unseen, reconstructed scenes.

    How often a scene's own prompt scores above each hard negative, by category; how often the true picture scores
    above a corrupted one; mean and spread of the reward on true pairs.
    """
    generator = torch.Generator().manual_seed(11)
    index = torch.arange(POOL - 2000, POOL)
    batch, images = scenes.take(index), pool["rebuilt"][index].float() / 255
    specs = true_specs(batch, generator)
    pictures = torch.cat([model.embed_images(b.to(device)) for b in images.split(500)])
    own = (pictures * model.embed_texts(word_ids([phrase(s) for s in specs]).to(device))).sum(-1)
    wins: dict[str, list[float]] = {name: [] for name in CATEGORIES}
    for i, spec in enumerate(specs):
        wrong = hard_negatives(spec)
        false = [
            w for w, t in zip(wrong, SpecTable(wrong).true_of(batch.take(torch.tensor([i])))[0], strict=True) if not t
        ]
        scores = pictures[i] @ model.embed_texts(word_ids([phrase(w) for w in false]).to(device)).T
        wins[spec.category] += (own[i] > scores).float().tolist()
    broken = corrupt(batch, images, generator)
    text = model.embed_texts(word_ids([phrase(s) for s in specs]).to(device))
    broken_scores = (torch.cat([model.embed_images(b.to(device)) for b in broken.split(500)]) * text).sum(-1)
    return {
        "hard_negative_accuracy": {name: round(sum(w) / len(w), 4) for name, w in wins.items()},
        "corrupted_accuracy": round((own > broken_scores).float().mean().item(), 4),
        "true_pair_reward": {"mean": round(own.mean().item(), 4), "std": round(own.std().item(), 4)},
    }
