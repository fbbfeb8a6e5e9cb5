"""Pictures for given prompts: what `leapalign sample` does once its arguments are checked."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from leapalign.config.keys import AlignConfig
from leapalign.evaluation.pictures import GAP, PAPER, SMALLEST_TILE, tile, to_image
from leapalign.evaluation.scores import batch_size, generate
from leapalign.method.draws import draw_noise
from leapalign.planning.configured import configured_pipeline, prompt_store


def sample_command(
    config: AlignConfig, transformer: Path | None, prompts: Sequence[str], output: Path, *, num_images: int
) -> str:
    """Draw `num_images` pictures of each prompt into one PNG and say so.

    A row holds a prompt's pictures, a column one noise: (seed, step 0, column), so that a picture does not depend on
    the other prompts. Prompts and settings are in the file's text fields.

    Args:
        transformer: folder of an aligned transformer; None samples the pipeline's own.
        output: PNG file in a folder that exists; written whole or not at all.
    """
    store = prompt_store(config, prompts)
    pipeline = configured_pipeline(config, transformer, scored=False)
    noise = draw_noise(config.seed, 0, range(num_images), pipeline.latent_shape(config.resolution))
    pictures = generate(
        pipeline,
        store,
        [prompt for prompt in prompts for _ in range(num_images)],
        noise.repeat(len(prompts), 1, 1),
        resolution=config.resolution,
        num_inference_steps=config.validation_inference_steps,
        guidance_scale=config.guidance_scale,
        microbatch=batch_size(config),
    )
    notes = PngInfo()
    for number, prompt in enumerate(prompts, 1):
        notes.add_itxt(f"prompt {number}", prompt)
    notes.add_itxt(
        "settings",
        f"model {config.pretrained_model_name_or_path}, transformer {transformer or 'unaligned'}, "
        f"seed {config.seed}, {config.validation_inference_steps} steps, guidance {config.guidance_scale:g}, "
        f"{config.resolution}x{config.resolution}",
    )
    draft = output.with_name(f".{output.name}")
    _sheet(pictures, columns=num_images).save(draft, format="PNG", pnginfo=notes)
    draft.replace(output)
    rows = f"{len(prompts)} prompt{'s' * (len(prompts) > 1)} x {num_images}"
    return f"{output}: {rows}, seed {config.seed}, {config.validation_inference_steps} steps"


def _sheet(pictures: Tensor, columns: int) -> Image.Image:
    """(N, 3, H, W) pictures row by row at full size; ones below SMALLEST_TILE pixels enlarged without smoothing."""
    small = max(pictures.shape[-2:]) < SMALLEST_TILE
    tiles = [tile(picture) if small else to_image(picture) for picture in torch.unbind(pictures)]
    width, height = tiles[0].width + GAP, tiles[0].height + GAP
    sheet = Image.new("RGB", (columns * width - GAP, len(tiles) // columns * height - GAP), PAPER)
    for index, image in enumerate(tiles):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
