"""What several commands begin with: torch and diffusers loaded quietly, and the option --transformer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from leapalign.config.loading import AlignConfig
from leapalign.errors import UsageError

TRANSFORMER: dict[str, Any] = {
    "metavar": "DIR",
    "help": "aligned transformer: a transformer/ folder, a run or a checkpoint (default: the pipeline's own)",
}


def transformer_folder(name: str | None) -> Path | None:
    """`name`, or the transformer/ in it; None for the pipeline's own transformer."""
    if name is None:
        return None
    for folder in (Path(name), Path(name) / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise UsageError(f"--transformer '{name}' holds no transformer (config.json); name a run's transformer/ folder")


def quiet() -> None:
    """No notices of transformers and diffusers; the environment's own TRANSFORMERS_VERBOSITY and the like win."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def load_libraries(config: AlignConfig) -> None:
    """Load torch, transformers and diffusers, without their notices and loading bars, and find model and device."""
    quiet()
    # Torch reads this when it is loaded. Segments that grow leave no gaps between tensors of many sizes.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from leapalign.families.source import resolve_device, resolve_model

    resolve_model(config.pretrained_model_name_or_path)
    resolve_device(config.device)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
