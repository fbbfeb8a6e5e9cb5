"""`leapalign embed`: compute and cache the prompt embeddings of a config, nothing else."""

from __future__ import annotations

import argparse
from typing import Any

from leapalign.commands.codes import DONE
from leapalign.commands.libraries import load_libraries
from leapalign.config.loading import AlignConfig
from leapalign.data.prompts import load_prompts

TEXT = "compute and cache the prompt embeddings of a config, nothing else"
OPTIONS: dict[str, dict[str, Any]] = {}
TAKES_CONFIG = True


def run(_: argparse.Namespace, config: AlignConfig) -> int:
    """Encode the prompts of training and validation that are not cached."""
    prompts = load_prompts(config.train_prompts, key="train_prompts")
    if config.validation_prompts is not None:
        prompts += load_prompts(config.validation_prompts, key="validation_prompts")
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    load_libraries(config)
    from leapalign.planning.configured import prompt_store

    store = prompt_store(config, texts)
    print(f"{len(texts)} prompts: {store.encoded} encoded now, {len(texts) - store.encoded} cached; {store.folder}")
    return DONE
