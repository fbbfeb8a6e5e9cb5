"""The learned reward of `shapes`: a small image-text two-tower model whose score is the cosine of the two embeddings.

It plays the part that PickScore or HPSv2 play for FLUX.1-dev: trained on pictures and texts alone, differentiable, and
imperfect. It shares nothing with the rule-based checker, which is kept for judging.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leapalign.zoo.shapes import REWARD_FOLDER
from leapalign.zoo.shapes.prompts import PREFIXES, vocabulary

WIDTH = 128
TEXT_LENGTH = 8  # the longest prompt's words
SILENT = {word for prefix in PREFIXES for word in prefix.split()}  # "draw", "show": they say nothing of the picture
WORD_ID = {word: i + 2 for i, word in enumerate(vocabulary())}  # 0 pads, 1 is an unknown word


def word_ids(texts: list[str]) -> Tensor:
    """(B, TEXT_LENGTH) int64 word ids, padded with 0; silent words are left out, longer texts are cut."""
    ids = torch.zeros(len(texts), TEXT_LENGTH, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        words = [WORD_ID.get(word, 1) for word in text.lower().split() if word not in SILENT][:TEXT_LENGTH]
        row[: len(words)] = torch.tensor(words)
    return ids


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _transformer(layers: int, width: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, 4, 3 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class TwoTower(nn.Module):
    """CNN and transformer over 16 cells for pictures, transformer over words for texts; both end in WIDTH
    dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), _Residual(64), _Residual(64),
            nn.Conv2d(64, WIDTH, 3, stride=2, padding=1), _Residual(WIDTH),
        )  # fmt: skip
        self.cell_position = nn.Parameter(0.02 * torch.randn(1, 17, WIDTH))  # entry 0 is the pooled token
        self.image_layers = _transformer(2, WIDTH)
        self.word = nn.Embedding(len(WORD_ID) + 2, 96)
        # As large as the words themselves: at 0.02 the tower read a bag of words and bound nothing in 2,000 steps.
        self.word_position = nn.Parameter(torch.randn(1, TEXT_LENGTH + 1, 96))
        self.text_layers = _transformer(2, 96)
        self.image_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.text_head = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # used in training only, as in SigLIP
        self.bias = nn.Parameter(torch.tensor(-6.0))

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) in [0, 1] -> unit vectors (B, WIDTH)."""
        cells = self.cells(images * 2 - 1).flatten(2).transpose(1, 2)
        tokens = torch.cat([cells.new_zeros(len(cells), 1, WIDTH), cells], 1) + self.cell_position
        return F.normalize(self.image_head(self.image_layers(tokens)[:, 0]), dim=-1)

    def embed_texts(self, ids: Tensor) -> Tensor:
        """Word ids (B, TEXT_LENGTH) -> unit vectors (B, WIDTH)."""
        words = self.word(ids)
        tokens = torch.cat([words.new_zeros(len(ids), 1, words.shape[-1]), words], 1) + self.word_position
        padding = F.pad(ids == 0, (1, 0), value=False)
        bias = torch.zeros(padding.shape, device=ids.device).masked_fill(padding, float("-inf"))
        return F.normalize(self.text_head(self.text_layers(tokens, src_key_padding_mask=bias)[:, 0]), dim=-1)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The reward: cosine in [-1, 1] of each picture (B, 3, 32, 32) in [0, 1] with its prompt; differentiable."""
        ids = word_ids(prompts).to(images.device)
        return (self.embed_images(images.float()) * self.embed_texts(ids)).sum(-1)


def save_reward(model: TwoTower, folder: Path, config: dict) -> None:
    """Write weights (fp16 safetensors) and `config` (what training measured)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_shapes_reward(device: str | torch.device = "cpu", folder: Path = REWARD_FOLDER) -> TwoTower:
    """The packaged reward model in fp32, frozen, in eval mode. Raises FileNotFoundError where its file is missing."""
    model = TwoTower()
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model.requires_grad_(False).eval().to(device)
