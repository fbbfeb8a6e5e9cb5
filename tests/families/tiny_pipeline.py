"""A complete FLUX pipeline of 70 thousand parameters with random weights, and a reward to go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from leapalign.config.keys import AlignConfig

WORDS = ["a", "red", "green", "blue", "dot"]
PROMPTS = ["a red dot", "a green dot", "a blue dot", "a dot", "red", "green dot a"]
RESOLUTION, TOKENS, CHANNELS = 16, 4, 16  # patches of 8 pixels


def clip_tokenizer() -> CLIPTokenizer:
    """One token for each of WORDS, built from its letters by byte-pair merges."""
    pieces: dict[str, None] = dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    merges = []
    for word in WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        pieces |= dict.fromkeys(letters)
        for end in range(1, len(letters)):
            merges.append(("".join(letters[:end]), letters[end]))
            pieces["".join(letters[: end + 1])] = None
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=8)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in WORDS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=8)


def clip_text_config(vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def save_tiny_pipeline(folder: Path) -> Path:
    """Write the pipeline in diffusers' layout; the same weights every time, away from their special initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 8, 8),
                layers_per_block=1,
                latent_channels=CHANNELS // 4,
                norm_num_groups=4,
                sample_size=RESOLUTION,
                scaling_factor=0.5,
                shift_factor=0.1,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=CLIPTextModel(clip_text_config(len(clip_words))),
            tokenizer=clip_words,
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=len(t5_words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
            ),
            tokenizer_2=t5_words,
            transformer=transformer,
        )
        pipeline.save_pretrained(folder)
    return folder


class ColourReward:
    """The mean of the picture's channel that the prompt names (red for none); 0.5 on grey."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        channel = torch.tensor([max(("red", "green", "blue").index(w) if w in ("red", "green", "blue") else 0
                                    for w in prompt.split()) for prompt in prompts])  # fmt: skip
        return images[torch.arange(len(prompts)), channel].mean((1, 2))


def tiny_config(pipeline: Path, output_dir: Path, **changes: Any) -> AlignConfig:
    """A run of seconds: prompts in a file beside `output_dir`, cached embeddings beside it too."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    prompts = output_dir.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(pipeline),
        "train_prompts": str(prompts),
        "output_dir": str(output_dir),
        "cache_dir": str(output_dir.parent / "cache"),
        "device": "cpu",
        "resolution": RESOLUTION,
        "max_sequence_length": 6,
        "num_inference_steps": 4,
        "train_batch_size": 3,
        "max_train_steps": 5,
        "checkpointing_steps": 2,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "threshold": 2.0,
        "validation_inference_steps": 2,
        "validation_images_per_prompt": 1,
        "report_to": [],
    }
    return AlignConfig(**{**settings, **changes})
