"""FlowPipeline against diffusers' FluxPipeline: the same ids, sigmas, pictures and samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from leapalign.engine.backbones.velocity import velocity
from leapalign.errors import UsageError
from leapalign.evaluation.scores import generate
from leapalign.families.pipeline import FlowPipeline, load_pipeline
from leapalign.families.source import resolve_device, resolve_model
from tests.families.tiny_pipeline import CHANNELS, RESOLUTION, TOKENS, save_tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> FlowPipeline:
    return load_pipeline(str(folder))


@pytest.fixture(scope="module")
def stock(folder: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(folder)


def noise(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


class Encoded:
    """Prompt embeddings as the stock pipeline computes them."""

    def __init__(self, stock: FluxPipeline) -> None:
        self.stock = stock

    @torch.no_grad()
    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        hidden, pooled, _ = self.stock.encode_prompt(list(prompts), max_sequence_length=6)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def test_samples_are_those_of_the_stock_pipeline(pipeline: FlowPipeline, stock: FluxPipeline) -> None:
    prompts = ["a red dot", "blue", "a green dot"]
    ours = generate(
        pipeline,
        Encoded(stock),
        prompts,
        noise(3),
        resolution=RESOLUTION,
        num_inference_steps=5,
        guidance_scale=2.5,
        microbatch=2,
    )
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompts,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=5,
        guidance_scale=2.5,
        latents=noise(3),
        max_sequence_length=6,
        output_type="pt",
    ).images
    assert ours.shape == (3, 3, RESOLUTION, RESOLUTION)
    # Their timestep goes through sigma * 1000 / 1000, one float32 rounding, and batches differ: a few ulps a step.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("resolution", [16, 32])
def test_ids_and_shapes_are_those_of_the_stock_pipeline(
    pipeline: FlowPipeline, stock: FluxPipeline, resolution: int
) -> None:
    embeds = Encoded(stock).batch(["red", "blue"])
    conditioning = pipeline.conditioning(embeds, resolution, 3.5)
    latents, ids = stock.prepare_latents(
        2, CHANNELS // 4, resolution, resolution, torch.float32, torch.device("cpu"), torch.Generator()
    )
    assert (2, *pipeline.latent_shape(resolution)) == latents.shape
    assert torch.equal(conditioning["img_ids"], ids)
    assert torch.equal(conditioning["txt_ids"], torch.zeros(6, 3))
    assert torch.equal(conditioning["guidance"], torch.tensor([3.5, 3.5]))


def test_pictures_are_the_stock_decoders(pipeline: FlowPipeline, stock: FluxPipeline) -> None:
    latents = 3 * noise(2)
    z = stock._unpack_latents(latents, RESOLUTION, RESOLUTION, stock.vae_scale_factor)
    with torch.no_grad():
        decoded = stock.vae.decode(z / stock.vae.config.scaling_factor + stock.vae.config.shift_factor).sample
        ours = pipeline.decode(latents)
    expected = stock.image_processor.postprocess(decoded, output_type="pt")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_decoding_is_differentiable_and_trains_nothing(pipeline: FlowPipeline) -> None:
    latents = noise(2).double().requires_grad_()
    weights = torch.randn(2, 3, RESOLUTION, RESOLUTION, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    vae = load_pipeline(str(pipeline.source), vae_dtype=torch.float64)
    (slope,) = torch.autograd.grad((vae.decode(latents) * weights).sum(), latents)
    direction, step = noise(2, seed=2).double(), 1e-6
    with torch.no_grad():
        ahead, behind = ((vae.decode(latents + s * direction) * weights).sum() for s in (step, -step))
    # Central differences: error step^2 of the third derivative and 1e-16 / step of rounding.
    torch.testing.assert_close((slope * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    assert all(not p.requires_grad for p in vae.vae.parameters())


def test_the_transformer_is_float32_and_trains_in_memory_of_its_own(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    FluxTransformer2DModel.from_pretrained(folder / "transformer").half().save_pretrained(half)
    loaded = load_pipeline(str(folder), transformer=half)
    assert {p.dtype for p in loaded.parameters.values()} == {torch.float32}
    assert all(p.requires_grad and p.is_leaf and p.data_ptr() % 64 == 0 for p in loaded.parameters.values())
    assert not loaded.transformer.training


def test_bfloat16_evaluates_near_float32_and_keeps_the_timestep(folder: Path, stock: FluxPipeline) -> None:
    embeds = Encoded(stock).batch(["a red dot"])
    full, mixed = load_pipeline(str(folder)), load_pipeline(str(folder), mixed_precision="bf16")
    conditioning = full.conditioning(embeds, RESOLUTION, 3.5)

    def at(pipeline: FlowPipeline, sigma: float) -> Tensor:
        return velocity(pipeline.transformer, noise(1), torch.tensor(sigma), conditioning)

    with torch.no_grad():
        exact, rounded = at(full, 0.8), at(mixed, 0.8)
        # bfloat16 keeps 8 bits; a few layers add up to a few per cent of the largest value.
        assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()
    assert torch.tensor(0.8).bfloat16() == torch.tensor(0.8007).bfloat16()
    seen: list[Tensor] = []
    mixed.transformer.time_text_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        at(mixed, 0.8), at(mixed, 0.8007)
    assert [float(t) for t in seen] == pytest.approx([800.0, 800.7], abs=1e-3)


def test_gradients_flow_under_bfloat16_after_a_pass_without_grad(folder: Path, stock: FluxPipeline) -> None:
    mixed = load_pipeline(str(folder), mixed_precision="bf16")
    conditioning = mixed.conditioning(Encoded(stock).batch(["blue"]), RESOLUTION, 3.5)
    with torch.no_grad():
        velocity(mixed.transformer, noise(1), torch.tensor(0.5), conditioning)
    velocity(mixed.transformer, noise(1), torch.tensor(0.5), conditioning).square().sum().backward()
    unused = {
        "transformer_blocks.0.ff_context",
        "transformer_blocks.0.norm2_context",
    }  # none here: a single block follows
    missing = [name for name, p in mixed.parameters.items() if p.grad is None and not name.startswith(tuple(unused))]
    assert not missing
    assert {p.grad.dtype for p in mixed.parameters.values() if p.grad is not None} == {torch.float32}


def test_what_is_no_pipeline_is_refused_in_one_line(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="nowhere' does not exist"):
        resolve_model("nowhere")
    with pytest.raises(UsageError, match=r"no model_index\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UsageError, match="is a StableDiffusionPipeline"):
        resolve_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UsageError, match="could not be loaded"):
        load_pipeline(str(tmp_path))
    assert resolve_model("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    assert resolve_model(str(folder)) == folder


def test_a_resolution_between_patches_is_refused(pipeline: FlowPipeline) -> None:
    with pytest.raises(UsageError, match="resolution = 20 is not divisible by 8"):
        pipeline.latent_shape(20)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="device = cuda:99"):
        resolve_device("cuda:99")
