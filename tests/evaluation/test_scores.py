"""Evaluation: paired noise, honest standard errors, the checker's verdict, and a table that adds up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leapalign.data.prompts import Prompt
from leapalign.evaluation.metrics import by_category, check_scenes, entropy_bits, estimate, is_scene
from leapalign.evaluation.pictures import before_after, grid, to_image
from leapalign.evaluation.scores import Evaluation, evaluate, evaluate_command, generate, table
from leapalign.families.pipeline import load_pipeline
from leapalign.method.draws import draw_noise
from leapalign.planning.configured import prompt_store
from tests.families.tiny_pipeline import PROMPTS, ColourReward, save_tiny_pipeline, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def scene(category: str, *objects: tuple[str, str | None]) -> dict[str, object]:
    return {"category": category, "objects": [{"shape": s, "colour": c} for s, c in objects], "relation": None}


def made_up(rewards: list[list[float]], correct: list[list[bool]] | None = None) -> Evaluation:
    return Evaluation(
        prompts=[f"p{i}" for i in range(len(rewards))],
        rewards=torch.tensor(rewards),
        correct=None if correct is None else torch.tensor(correct),
        categories=[] if correct is None else ["one", "two"] * (len(rewards) // 2),
        colour_entropy=None if correct is None else 1.5,
        shown=torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        shown_prompts=[0, 1],
    )


def test_standard_errors_are_over_prompts() -> None:
    values = torch.tensor([[0.0, 2.0], [4.0, 6.0], [2.0, 4.0]])  # prompts' means 1, 5, 3: variance 4
    assert estimate(values).mean == 3
    assert estimate(values).error == pytest.approx(math.sqrt(4 / 3))
    assert estimate(values[:, :1].expand(3, 50)).error == pytest.approx(math.sqrt(4 / 3))  # copies add no certainty
    assert estimate(values[:1]).error is None
    assert str(estimate(values[:1])) == "1.000"
    right = torch.tensor([[True], [False], [True], [True]])
    assert estimate(right).percent() == "75.0 ± 25.0 %"
    assert {k: v.mean for k, v in by_category(right, ["b", "a", "b", "a"]).items()} == {"b": 1.0, "a": 0.5}


def test_entropy_is_in_bits() -> None:
    assert entropy_bits(["red", "blue"] * 3) == 1
    assert entropy_bits(["red"] * 3) == 0
    assert entropy_bits([*"aabc"]) == 1.5
    assert entropy_bits([]) is None


def test_the_checker_judges_each_picture_by_its_own_prompt() -> None:
    images = torch.full((3, 3, 32, 32), 0.5)
    images[:, :, 10:22, 10:22] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]  # a red square
    metadata = [
        scene("colors", ("square", "red")),
        scene("colors", ("square", "blue")),
        scene("single_object", ("square", None)),
    ]
    correct, colours = check_scenes(images, metadata)
    assert correct.tolist() == [True, False, True]
    assert colours == ["red"]  # of the one prompt that names no colour
    assert is_scene(metadata[0])
    assert not is_scene({"category": "colors"})


def test_every_picture_has_its_own_noise_whatever_the_batch(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run", validation_images_per_prompt=2, seed=5, microbatch=2)
    pipeline, store = load_pipeline(str(folder)), prompt_store(config, PROMPTS)
    prompts = [Prompt(text) for text in PROMPTS]
    seen: list[Tensor] = []

    def reward(images: Tensor, texts: list[str]) -> Tensor:
        seen.append(images)
        return ColourReward()(images, texts)

    result = evaluate(pipeline, store, prompts, reward, config)
    pictures = torch.cat(seen)
    repeated = [text for text in PROMPTS for _ in range(2)]
    noise = draw_noise(5, 0, range(12), pipeline.latent_shape(config.resolution))
    at_once = generate(
        pipeline, store, repeated, noise, resolution=16, num_inference_steps=2, guidance_scale=config.guidance_scale
    )
    # Another batch size: float32 sums in another order.
    torch.testing.assert_close(pictures, at_once, rtol=0, atol=1e-5)
    assert result.rewards.shape == (6, 2)
    torch.testing.assert_close(result.rewards.flatten(), ColourReward()(pictures, repeated))
    assert torch.equal(result.shown, pictures[::2])
    assert result.correct is None
    again = evaluate(pipeline, store, prompts, ColourReward(), config)
    assert torch.equal(again.rewards, result.rewards)


def test_scenes_are_checked_when_every_prompt_describes_one(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run", resolution=32)
    prompts = [Prompt("a red dot", scene("colors", ("square", "red"))), Prompt("a dot", scene("x", ("square", None)))]
    pipeline, store = load_pipeline(str(folder)), prompt_store(config, ["a red dot", "a dot"])
    result = evaluate(pipeline, store, prompts, ColourReward(), config)
    assert result.correct is not None
    assert result.correct.shape == (2, 1)
    assert list(result.category_accuracy) == ["colors", "x"]
    numbers = json.loads(json.dumps(result.as_dict()))
    assert set(numbers) == {
        "prompts", "images_per_prompt", "reward", "accuracy", "accuracy_by_category", "colour_entropy_bits",
    }  # fmt: skip
    mixed = evaluate(pipeline, store, [prompts[0], Prompt("a dot")], ColourReward(), config)
    assert mixed.accuracy is None


def test_the_table_shows_change_with_its_paired_error() -> None:
    before = made_up([[0.0], [1.0], [0.0], [1.0]], [[False], [True], [False], [False]])
    after = made_up([[0.5], [1.5], [0.5], [1.5]], [[True], [True], [False], [False]])
    lines = table(after, before).splitlines()
    assert lines[0].split() == ["before", "after", "change"]
    assert lines[1].split("  ")[-1].strip() == "+0.500 ± 0.000"  # each picture gained the same
    assert "25.0 ± 25.0 %" in lines[2]
    assert "+25.0 ± 25.0 %" in lines[2]
    assert [line.split()[0] for line in lines[1:]] == ["reward", "accuracy", "one", "two", "colour"]
    assert "change" not in table(after)


def test_an_evaluation_comes_back_from_its_file(tmp_path: Path) -> None:
    result = made_up([[0.1, 0.2], [0.3, 0.4]], [[True, False], [True, True]])
    result.save(tmp_path / "new" / "x.safetensors")
    back = Evaluation.load(tmp_path / "new" / "x.safetensors")
    assert torch.equal(back.rewards, result.rewards)
    assert back.as_dict() == result.as_dict()
    assert back.note(1) == result.note(1) == "0.300, right"
    assert (back.shown - result.shown).abs().max() <= 0.5 / 255 + 1e-6
    plain = made_up([[0.1], [0.2]])
    plain.save(tmp_path / "y.safetensors")
    assert Evaluation.load(tmp_path / "y.safetensors").correct is None


def test_the_command_scores_another_transformer(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run")
    prompts = [Prompt(text) for text in PROMPTS]
    own = evaluate_command(config, None, prompts, reward=ColourReward())
    changed = load_pipeline(str(folder)).transformer
    with torch.no_grad():
        changed.proj_out.weight.mul_(2)
    changed.save_pretrained(tmp_path / "other")
    other = evaluate_command(config, tmp_path / "other", prompts, reward=ColourReward())
    assert own["reward"]["mean"] != other["reward"]["mean"]
    assert own["table"].splitlines()[0].strip() == "6 prompts"
    json.dumps(own)


@pytest.mark.parametrize("size", [8, 200, 500])
def test_pictures_of_any_size_make_a_sheet(size: int) -> None:
    pictures = torch.rand(5, 3, size, size)
    captions = ["short", "a caption that is far too long for two lines below a picture of such a size " * 3, *"abc"]
    sheet = grid(pictures, captions, columns=2)
    assert sheet.width > 2 * min(size, 100)
    pairs = before_after(pictures, pictures.flip(0), captions, [("0.1", "0.2")] * 5)
    assert pairs.width > 0
    assert to_image(pictures[0]).size == (size, size)
