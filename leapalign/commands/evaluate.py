"""`leapalign evaluate`: score a transformer on held-out prompts."""

from __future__ import annotations

import argparse
import json
from typing import Any

from leapalign.commands.codes import DONE
from leapalign.commands.libraries import TRANSFORMER, load_libraries, transformer_folder
from leapalign.config.loading import AlignConfig
from leapalign.data.prompts import load_prompts

TEXT = "score a transformer on held-out prompts: reward, and accuracy where a checker knows the scene"
OPTIONS: dict[str, dict[str, Any]] = {
    "transformer": TRANSFORMER,
    "prompts": {
        "metavar": "SRC",
        "help": ".txt, .jsonl, shapes:validation or a data set id (default: validation_prompts)",
    },
    "json": {"action": "store_true", "help": "print JSON instead of a table"},
}
TAKES_CONFIG = True


def run(options: argparse.Namespace, config: AlignConfig) -> int:
    """Print the scores as a table or JSON."""
    if options.prompts is None:
        prompts = load_prompts(config.validation_prompts, key="validation_prompts")
    else:
        prompts = load_prompts(options.prompts, key="--prompts")
    transformer = transformer_folder(options.transformer)
    load_libraries(config)
    from leapalign.evaluation.scores import evaluate_command

    result = evaluate_command(config, transformer, prompts)
    table = result.pop("table")
    print(json.dumps(result, indent=2) if options.json else table)
    return DONE
