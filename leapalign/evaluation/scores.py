"""Sampling and evaluation: the same prompts and the same noise for every transformer that is compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from leapalign.config.keys import AlignConfig
from leapalign.data.prompts import Prompt
from leapalign.engine.backbones.velocity import microbatches
from leapalign.engine.model import StreamedModel
from leapalign.evaluation.metrics import Estimate, by_category, check_scenes, entropy_bits, estimate, is_scene
from leapalign.executors.streamed import reward_phase, streamed_rollout
from leapalign.families.pipeline import FlowPipeline
from leapalign.method.draws import draw_noise
from leapalign.method.trajectory import rollout
from leapalign.planning.configured import configured_pipeline, configured_reward, prompt_store
from leapalign.rewards.protocol import RewardModel

SHOWN = 12  # pictures kept to look at


class Embeddings(Protocol):
    """Where prompt embeddings are found, see `leapalign.data.embeddings.EmbeddingStore`."""

    def batch(self, prompts: Sequence[str], /) -> dict[str, Tensor]: ...


@torch.no_grad()
def generate(
    pipeline: FlowPipeline,
    store: Embeddings,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    microbatch: int | None = None,
    levels: int | None = None,
) -> Tensor:
    """Sample one picture for each prompt, as the diffusers pipeline would from the same latents.

    Args:
        prompts: N texts whose embeddings `store` has.
        noise: (N, S, C) packed latents at sigma 1, on any device.
        microbatch: pictures at once; None for all. A streamed transformer splits them further, as its plan says.
        levels: noise levels whose modulation a streamed transformer has at once; None for all.

    Returns:
        (N, 3, resolution, resolution) float32 in [0, 1], on the CPU.
    """
    assert len(prompts) == len(noise), f"{len(prompts)} prompts but {len(noise)} noise samples"
    sigmas = pipeline.sigmas(num_inference_steps, resolution)
    pictures = []
    for rows in microbatches(len(prompts), microbatch):
        conditioning = pipeline.conditioning(store.batch(prompts[rows]), resolution, guidance_scale)
        latents = _sample(pipeline.transformer, conditioning, noise[rows].to(pipeline.home), sigmas, levels)
        with picture_phase(pipeline, pipeline.vae):
            for few in pictures_at_once(pipeline, len(latents)):
                pictures.append(pipeline.decode(latents[few]).float().cpu())
    return torch.cat(pictures)


def picture_phase(pipeline: FlowPipeline, *models: object) -> AbstractContextManager[None]:
    """Inside the block the models are on the device, and a streamed transformer's weights as its plan says."""
    if isinstance(pipeline.transformer, StreamedModel):
        return reward_phase(pipeline.transformer, lambda: pipeline.visit(*models))
    return nullcontext()


def pictures_at_once(pipeline: FlowPipeline, count: int) -> Iterator[slice]:
    """The rows of `count` pictures that a VAE or reward takes at once, where the transformer is streamed."""
    transformer = pipeline.transformer
    return microbatches(count, transformer.plan.reward_microbatch if isinstance(transformer, StreamedModel) else None)


def _sample(
    transformer: nn.Module, conditioning: Mapping[str, Any], noise: Tensor, sigmas: Tensor, levels: int | None
) -> Tensor:
    """(B, ...) image latents."""
    if not isinstance(transformer, StreamedModel):
        return rollout(transformer, conditioning, noise, sigmas).final
    rolled = streamed_rollout(transformer, conditioning, noise, sigmas, levels=levels)
    rolled.drop()
    return rolled.trajectory.final


@dataclass(frozen=True)
class Evaluation:
    """Scores of P prompts with m pictures each.

    Attributes:
        rewards: (P, m) float32.
        correct: (P, m) bool verdicts of the rule-based checker; None unless every prompt describes a `shapes` scene.
        categories: the prompts' categories; empty without `correct`.
        colour_entropy: bits, of the colours found where the prompt names none.
        shown: (n, 3, H, W) float32, the first picture of the prompts at `shown_prompts`.
    """

    prompts: list[str]
    rewards: Tensor
    correct: Tensor | None
    categories: list[str]
    colour_entropy: float | None
    shown: Tensor
    shown_prompts: list[int]

    @property
    def reward(self) -> Estimate:
        """Mean reward."""
        return estimate(self.rewards)

    @property
    def accuracy(self) -> Estimate | None:
        """Fraction of pictures that are right."""
        return None if self.correct is None else estimate(self.correct)

    @property
    def category_accuracy(self) -> dict[str, Estimate]:
        """The same by category; empty without a checker."""
        return {} if self.correct is None else by_category(self.correct, self.categories)

    def as_dict(self) -> dict[str, Any]:
        """Numbers for JSON: every mean with its standard error over prompts."""

        def pair(value: Estimate) -> dict[str, float | None]:
            return {"mean": value.mean, "standard_error": value.error}

        result: dict[str, Any] = {"prompts": len(self.prompts), "images_per_prompt": self.rewards.shape[1]}
        spread = self.rewards.double().std(correction=0)
        result["reward"] = {**pair(self.reward), "standard_deviation": float(spread)}
        if self.accuracy is not None:
            result["accuracy"] = pair(self.accuracy)
            result["accuracy_by_category"] = {name: pair(value) for name, value in self.category_accuracy.items()}
            result["colour_entropy_bits"] = self.colour_entropy
        return result

    def note(self, position: int) -> str:
        """What to write under the shown picture at `position`: its reward and, where there is one, the verdict."""
        prompt = self.shown_prompts[position]
        verdict = "" if self.correct is None else (", right" if self.correct[prompt, 0] else ", wrong")
        return f"{float(self.rewards[prompt, 0]):.3f}{verdict}"

    def save(self, path: Path) -> None:
        """One safetensors file, shown pictures included (8 bits a channel)."""
        tensors = {"rewards": self.rewards, "shown": (self.shown * 255).round().to(torch.uint8)}
        if self.correct is not None:
            tensors["correct"] = self.correct
        names = ("prompts", "categories", "colour_entropy", "shown_prompts")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        save_file(tensors, draft, metadata={"evaluation": json.dumps({name: getattr(self, name) for name in names})})
        draft.replace(path)

    @staticmethod
    def load(path: Path) -> Evaluation:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            rest = json.loads(file.metadata()["evaluation"])
        shown = tensors.pop("shown").float() / 255
        return Evaluation(rewards=tensors["rewards"], correct=tensors.get("correct"), shown=shown, **rest)


@torch.no_grad()
def evaluate(
    pipeline: FlowPipeline, store: Embeddings, prompts: Sequence[Prompt], reward: RewardModel, config: AlignConfig
) -> Evaluation:
    """Score `config.validation_images_per_prompt` pictures of each prompt.

    Noise is drawn for (seed, step 0, picture), which no training step uses: two transformers evaluated with one config
    see the same noise, so that their scores may be compared pairwise.
    """
    images_per_prompt = config.validation_images_per_prompt
    scenes = all(is_scene(prompt.metadata) for prompt in prompts)
    shown_prompts = _spread(len(prompts), SHOWN)
    wanted = {index * images_per_prompt for index in shown_prompts}
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    shape = pipeline.latent_shape(config.resolution)
    rewards, correct, colours, shown = [], [], [], []
    for rows in microbatches(len(repeated), batch_size(config)):
        batch = repeated[rows]
        texts = [prompt.text for prompt in batch]
        pictures = generate(
            pipeline,
            store,
            texts,
            draw_noise(config.seed, 0, range(rows.start, rows.stop), shape),
            resolution=config.resolution,
            num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.guidance_scale,
            levels=config.num_inference_steps,  # as many as a training step has
        )
        with picture_phase(pipeline, reward):
            for few in pictures_at_once(pipeline, len(pictures)):
                rewards.append(reward(pictures[few].to(pipeline.device), texts[few]).float().cpu())
        shown += [
            picture for picture, index in zip(pictures, range(rows.start, rows.stop), strict=True) if index in wanted
        ]
        if scenes:
            right, found = check_scenes(pictures, [prompt.metadata for prompt in batch])
            correct.append(right)
            colours += found
    return Evaluation(
        prompts=[prompt.text for prompt in prompts],
        rewards=torch.cat(rewards).unflatten(0, (-1, images_per_prompt)),
        correct=torch.cat(correct).unflatten(0, (-1, images_per_prompt)) if scenes else None,
        categories=[str(prompt.metadata["category"]) for prompt in prompts] if scenes else [],
        colour_entropy=entropy_bits(colours),
        shown=torch.stack(shown),
        shown_prompts=shown_prompts,
    )


def table(after: Evaluation, before: Evaluation | None = None) -> str:
    """The scores as aligned text; with `before`, the change as well.

    The change's standard error is that of the pictures' paired differences, for the noise is the same.
    """
    lines = [_score_line("reward", after.reward, before.reward if before else None, _paired(after, before, "rewards"))]
    if after.accuracy is not None:
        earlier = before.category_accuracy if before else {}
        change = _paired(after, before, "correct")
        lines.append(_score_line("accuracy", after.accuracy, before.accuracy if before else None, change, percent=True))
        lines += [
            _score_line(f"  {name}", value, earlier.get(name), None, percent=True)
            for name, value in after.category_accuracy.items()
        ]
        bits = [f"{e.colour_entropy:.2f} bits" for e in (before, after) if e and e.colour_entropy is not None]
        lines.append(["colour entropy", *bits])
    head = ["", "before", "after", "change"] if before else ["", f"{len(after.prompts)} prompts"]
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


def evaluate_command(
    config: AlignConfig, transformer: str | Path | None, prompts: Sequence[Prompt], *, reward: RewardModel | None = None
) -> dict[str, Any]:
    """What `leapalign evaluate` prints: the scores for JSON, and under "table" the same as text.

    Args:
        transformer: folder of an aligned transformer; None evaluates the pipeline's own.
        reward: a model to use instead of the one that the config names.
    """
    store = prompt_store(config, [prompt.text for prompt in prompts])
    pipeline = configured_pipeline(config, transformer)
    result = evaluate(pipeline, store, prompts, reward or configured_reward(config), config)
    return {**result.as_dict(), "table": table(result)}


def batch_size(config: AlignConfig) -> int:
    """Pictures to draw together; a streamed transformer takes a whole batch and splits it as its plan says."""
    return config.train_batch_size if config.executor == "streamed" else config.microbatch or config.train_batch_size


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` indices, evenly over range(count), so that every category is seen."""
    number = min(count, most)
    return [i * count // number for i in range(number)]


def _paired(after: Evaluation, before: Evaluation | None, name: str) -> Estimate | None:
    values = [getattr(e, name) for e in (after, before) if e is not None]
    if len(values) < 2 or values[0].shape != values[1].shape:
        return None
    return estimate(values[0].double() - values[1].double())


def _score_line(
    name: str, after: Estimate, before: Estimate | None, change: Estimate | None, *, percent: bool = False
) -> list[str]:
    cells = [value.percent() if percent else str(value) for value in (before, after) if value is not None]
    if change is not None:
        sign = "+" if change.mean >= 0 else ""
        cells.append(sign + (change.percent() if percent else str(change)))
    return [name, *cells]
