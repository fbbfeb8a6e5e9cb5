"""Where a pipeline comes from: device, folder or hub id, its family, and its models' shapes without their weights."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leapalign import families
from leapalign.errors import UsageError
from leapalign.families import autoencoder
from leapalign.families.protocol import Family

if TYPE_CHECKING:
    from leapalign.config.keys import AlignConfig

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one, else the CPU. A GPU has its index.

    Raises:
        UsageError: a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    missing_cuda = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing_cuda or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UsageError(f"device = {name}: torch {torch.__version__} sees no such device here; use auto or cpu")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def resolve_model(name: str) -> Path | str:
    """`shapes` is the packaged pipeline's folder, an existing folder is itself, anything else must be a hub id.

    Raises:
        UsageError: neither of them, or a folder that is no pipeline of a family that is trained.
    """
    key = f"pretrained_model_name_or_path = '{name}'"
    if name == "shapes":
        from leapalign.zoo.shapes import PIPELINE_FOLDER

        folder = PIPELINE_FOLDER
    elif Path(name).is_dir():
        folder = Path(name)
    elif re.fullmatch(_HUB_ID, name):
        return name
    else:
        raise UsageError(f"{key} does not exist; name a folder, a hub id (owner/name) or 'shapes'")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(f"{key}: {folder} has no model_index.json; name a pipeline folder in the diffusers layout")
    family_of(folder, name)
    return folder


def family_of(source: Path | str, name: str | None = None) -> Family:
    """The family of a pipeline's folder or hub id, by its model_index.json; without one that of `of_pipeline(None)`.

    Args:
        name: as the user gave it, for the message.

    Raises:
        UsageError: a pipeline that is not trained.
    """
    kind: str | None = None
    if isinstance(source, Path) and (source / "model_index.json").is_file():
        kind = json.loads((source / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    elif isinstance(source, str):
        kind = _hub_class(source)
    found = families.of_pipeline(kind)
    if found is None:
        kinds = [each.pipeline_class for each in families.trained()]
        supported = f"{kinds[0]} is" if len(kinds) == 1 else f"{', '.join(kinds)} are"
        raise UsageError(f"pretrained_model_name_or_path = '{name or source}' is a {kind}; only {supported} supported")
    return found


def transformer_config(config: AlignConfig) -> Mapping[str, Any]:
    """transformer/config.json of the pipeline: known for its name, or from its folder or the hub.

    Raises:
        UsageError: it is not there.
    """
    name = config.pretrained_model_name_or_path
    return published()[name] if name in published() else _read(name, "transformer")


def vae_config(config: AlignConfig) -> Mapping[str, Any]:
    """vae/config.json of the pipeline, in the same way."""
    name = config.pretrained_model_name_or_path
    return autoencoder.PUBLISHED if name in published() else _read(name, "vae")


@functools.cache
def published() -> Mapping[str, Mapping[str, Any]]:
    """{hub id: transformer/config.json} of every family."""
    return {name: shapes for each in families.every() for name, shapes in each.published.items()}


def _read(name: str, part: str) -> Mapping[str, Any]:
    source = resolve_model(name)
    found: Mapping[str, Any]
    try:
        if isinstance(source, Path):
            found = json.loads((source / part / "config.json").read_text(encoding="utf-8"))
        else:
            found = _from_hub(source, part)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"pretrained_model_name_or_path = '{name}': {part}/config.json, from which memory is planned, could not be "
            f"read: {reason}; name a pipeline folder, a hub id within reach, or one of {', '.join(published())}"
        ) from error
    return found


@functools.cache
def _from_hub(name: str, part: str) -> Mapping[str, Any]:
    from diffusers import AutoencoderKL

    found: Mapping[str, Any] = AutoencoderKL.load_config(name, subfolder=part)  # of any class: it reads config.json
    return found


@functools.cache
def _hub_class(name: str) -> str | None:
    """`_class_name` of a hub id's model_index.json; None where the hub cannot be asked: loading says why."""
    from diffusers import DiffusionPipeline

    try:
        found: str | None = DiffusionPipeline.load_config(name).get("_class_name")
    except (OSError, ValueError):
        return None
    return found
