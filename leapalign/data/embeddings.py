"""Prompt embeddings of a pipeline's text encoders: computed once, cached on disk, read row by row.

T5-XXL needs 9.5 GB in bfloat16, so the encoders are loaded alone, used, and freed before the run begins. An embedding
of 512 tokens is 4 MiB in bfloat16; 10,000 of them (40 GB) stay in the files and only a batch is ever in memory.

On disk: ``<cache>/embeddings/<fingerprint of encoders and settings>/<hash of prompts>.safetensors``, where the header
lists the file's prompts. A file appears under its name only when it is whole, new prompts add files, and a computation
that was stopped goes on where it was.
"""

import gc
import hashlib
import json
import logging
import math
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leapalign.engine.memory.sizes import spell_bytes
from leapalign.errors import UsageError
from leapalign.families.protocol import Family, PromptEncoder
from leapalign.families.source import family_of

log = logging.getLogger(__name__)

MIB = 2**20
SHARD_BYTES = 512 * MIB  # what encoding holds in memory before it writes a file
SHARD_PROMPTS = 4096  # keeps the header, which is read when a store is opened, below 1 MB
HASH_WHOLE_BELOW = 64 * MIB  # larger files: size, time of change and both ends
TOKENS_A_BATCH = 4096
ENCODING_BYTES = 2 * 2**30  # of the device, beside the encoders' weights: its context, and the activations of a batch


@dataclass(frozen=True)
class EmbeddingStore:
    """Embeddings on disk, found by their prompt."""

    folder: Path
    rows: dict[str, tuple[Any, int]]  # prompt -> (open safetensors file, row)
    encoded: int  # prompts that were not in the cache and have been encoded for this store

    def __contains__(self, prompt: str) -> bool:
        return prompt in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Read the embeddings of `prompts`, repeats allowed.

        Returns:
            {name: (B, ...)} as the family's encoder named them (FLUX: encoder_hidden_states (B, max_sequence_length,
            D_t5) and pooled_projections (B, D_clip)), on the CPU in the dtype in which they were encoded.

        Raises:
            ValueError: a prompt that was not among those given to `embed_prompts` and is not cached.
        """
        unknown = [prompt for prompt in prompts if prompt not in self.rows]
        if unknown:
            raise ValueError(f"prompt {unknown[0]!r} has no embedding; give it to embed_prompts first")
        names = list(self.rows[prompts[0]][0].keys()) if prompts else []
        return {name: torch.cat([_row(*self.rows[prompt], name) for prompt in prompts]) for name in names}


def embed_prompts(
    pipeline_path: str | Path,
    prompts: Sequence[str],
    *,
    max_sequence_length: int,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    device_bytes: float = math.inf,
    dtype: torch.dtype = torch.float32,
) -> EmbeddingStore:
    """Text embeddings of the distinct `prompts`; those in the cache are not computed again.

    Args:
        pipeline_path: pipeline in the diffusers layout (folder or hub id); only its text encoders and
            tokenizers are read.
        prompts: any number, repeats allowed.
        max_sequence_length: tokens of an embedding; longer prompts are cut, with a warning.
        cache_dir: folder of the cache; None: $LEAPALIGN_CACHE, else leapalign/ in $XDG_CACHE_HOME or ~/.cache.
        device, dtype: where and in which precision the encoders run; the embeddings are kept in `dtype`.
        device_bytes: of the device that may be taken; encoders that need more run on the CPU, with a warning.

    Raises:
        UsageError: no text encoders there, or a damaged file in the cache.
    """
    family = family_of(Path(pipeline_path) if Path(pipeline_path).is_dir() else str(pipeline_path))
    source = _encoder_folder(pipeline_path, family)
    settings = {
        "encoders": _fingerprint(source, family.encoders),
        "max_sequence_length": max_sequence_length,
        "dtype": str(dtype).removeprefix("torch."),
        "transformers": metadata.version("transformers"),  # tokenizers have changed between releases
        "format": 1,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_folder(cache_dir) / "embeddings" / key[:32]
    cached = _open_files(folder)
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cached]
    if not missing:
        return EmbeddingStore(folder, cached, encoded=0)
    _encode(family, source, missing, folder, max_sequence_length, torch.device(device), device_bytes, dtype)
    return EmbeddingStore(folder, _open_files(folder), encoded=len(missing))


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The cache's folder: `cache_dir`, else $LEAPALIGN_CACHE, else leapalign/ in $XDG_CACHE_HOME or ~/.cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    if named := os.environ.get("LEAPALIGN_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leapalign"


def _encode(
    family: Family, source: Path, prompts: list[str], folder: Path, length: int, device: torch.device,
    device_bytes: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Encode `prompts` and add them to `folder`, a file for every SHARD_BYTES."""
    encoder = family.load_encoder(source, dtype)
    device = place(device, device_bytes, encoder.weight_bytes)
    encoder.to(device)
    _warn_of_cuts(encoder, prompts, length)
    done: list[str] = []
    rows: list[dict[str, Tensor]] = []  # {name: (n, ...)} each
    try:
        size = max(1, TOKENS_A_BATCH // length)
        for batch in _with_progress(prompts, size):
            full = batch + batch[-1:] * (size - len(batch))  # one shape: no embedding depends on its batch's size
            found = encoder.encode(full, length)
            done += batch
            rows.append({name: value[: len(batch)].cpu() for name, value in found.items()})
            if sum(value.nbytes for row in rows for value in row.values()) >= SHARD_BYTES or len(done) >= SHARD_PROMPTS:
                _write(folder, done, rows)
                done, rows = [], []
        if done:
            _write(folder, done, rows)
    finally:
        del encoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def place(device: torch.device, device_bytes: float, weight_bytes: int) -> torch.device:
    """The device, or the CPU if the encoders' weights and a batch's activations are more than it may hold."""
    needed = weight_bytes + ENCODING_BYTES
    if device.type == "cpu" or needed <= device_bytes:
        return device
    log.warning(
        "the text encoders take %s of device memory, and there are %s: they run on the CPU, once for all prompts",
        spell_bytes(needed),
        spell_bytes(int(device_bytes)),
    )
    return torch.device("cpu")


def _write(folder: Path, prompts: list[str], rows: list[dict[str, Tensor]]) -> None:
    """One file, whole or not at all: written beside its place and renamed."""
    listing = json.dumps(prompts)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{uuid.uuid4().hex}.part"
    try:
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        save_file(tensors, part, metadata={"prompts": listing})
        os.replace(part, folder / f"{hashlib.sha256(listing.encode()).hexdigest()[:32]}.safetensors")
    finally:
        part.unlink(missing_ok=True)


def _open_files(folder: Path) -> dict[str, tuple[Any, int]]:
    """Open every file of the cache folder; tensors are read later, row by row."""
    rows: dict[str, tuple[Any, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UsageError(f"cached embeddings '{path}' are damaged ({error}); delete the file") from None
        for row, prompt in enumerate(json.loads(file.metadata()["prompts"])):
            rows.setdefault(prompt, (file, row))
    return rows


def _row(file: Any, row: int, name: str) -> Tensor:
    return file.get_slice(name)[row : row + 1]


def _encoder_folder(pipeline_path: str | Path, family: Family) -> Path:
    """The local folder of the text encoders and tokenizers; from the hub only these are fetched."""
    folder = Path(pipeline_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = ["model_index.json", "scheduler/*", *(f"{name}/*" for name in family.encoders)]
        try:
            folder = Path(snapshot_download(str(pipeline_path), allow_patterns=wanted))
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"pretrained_model_name_or_path = '{pipeline_path}' is no folder and could not be fetched: {reason}"
            ) from None
    absent = [name for name in family.encoders if not (folder / name).is_dir()]
    if absent:
        raise UsageError(
            f"pretrained_model_name_or_path = '{pipeline_path}' has no {absent[0]}/; "
            f"it must be a {family.name.upper()} pipeline in the diffusers layout"
        )
    return folder


def _fingerprint(source: Path, encoders: Sequence[str]) -> str:
    """sha256 over the encoders' and tokenizers' files: their contents, or for large ones size, time and both ends."""
    digest = hashlib.sha256()
    for path in sorted(path for name in encoders for path in (source / name).rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(source)} {size}\n".encode())
        with path.open("rb") as file:
            if size < HASH_WHOLE_BELOW:
                digest.update(file.read())
            else:
                digest.update(f"{path.stat().st_mtime_ns}\n".encode() + file.read(MIB))
                file.seek(-MIB, os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()


def _warn_of_cuts(encoder: PromptEncoder, prompts: list[str], length: int) -> None:
    cut = [prompt for prompt, tokens in zip(prompts, encoder.lengths(prompts), strict=True) if tokens > length]
    if cut:
        log.warning(
            "%d of %d prompts exceed max_sequence_length = %d and are cut: %r", len(cut), len(prompts), length, cut[0]
        )


def _with_progress(prompts: list[str], size: int) -> Iterator[list[str]]:
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    quiet = len(batches) < 4 or not sys.stderr.isatty()
    yield from track(batches, "encoding prompts", console=Console(stderr=True), transient=True, disable=quiet)
