"""The untrained parts of the `shapes` pipeline, all in stock diffusers and transformers classes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from leapalign.zoo.shapes.prompts import vocabulary

T5_TOKENS = 9  # the longest prompt has 8 words; T5 adds an end token
CLIP_TOKENS = 10  # CLIP adds a start token too
LATENT_CHANNELS = 8
LATENT_SIZE = 8  # 32 pixels / 4; packed 2x2 into 16 tokens of 32 channels
TEXT_WIDTH = 64
GUIDANCE = 3.5  # the guidance input where none is asked for, FLUX.1-dev's usual scale


def build_autoencoder() -> AutoencoderKL:
    """4x down, 8 latent channels, about 0.4M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_transformer() -> FluxTransformer2DModel:
    """2 double and 4 single blocks of width 128: 2.3M parameters."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX's dynamic shift, anchored at this model's 16 tokens."""
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=16,
        max_image_seq_len=256,
    )


def _word_tokenizer(special: list[str], template: processors.TemplateProcessing | None) -> Tokenizer:
    ids = {token: i for i, token in enumerate(special + vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        tokenizer.post_processor = template
    return tokenizer


def build_t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A word-level T5 encoder: 2 layers of width 64; `</s>` ends a prompt."""
    special = ["<pad>", "</s>", "<unk>"]
    end = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(special, end),
        pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=T5_TOKENS,
    )  # fmt: skip
    config = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=16, num_heads=4, d_ff=128, num_layers=2,
        dropout_rate=0.0, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16, relative_attention_max_distance=16,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    return T5EncoderModel(config), tokenizer


def build_clip() -> tuple[CLIPTextModel, PreTrainedTokenizerFast]:
    """A word-level CLIP text encoder, 1 layer of width 64, whose pooled output is read at the end token."""
    special = ["<pad>", "<unk>", "<start>", "<end>"]  # transformers reads end id 2 as "the largest id", so 3
    ends = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(special, ends),
        pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>", model_max_length=CLIP_TOKENS,
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=CLIP_TOKENS, projection_dim=TEXT_WIDTH, pad_token_id=0,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return CLIPTextModel(config), tokenizer


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Token ids (B, model_max_length), padded as FluxPipeline pads them (no attention mask is used anywhere)."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
