"""`leapalign sample`: draw pictures for prompts into one PNG, a row for each prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from leapalign.commands.codes import DONE
from leapalign.commands.libraries import TRANSFORMER, load_libraries, transformer_folder
from leapalign.config.loading import AlignConfig
from leapalign.data.prompts import load_prompts
from leapalign.errors import UsageError

TEXT = "draw pictures for prompts into one PNG, a row for each prompt"
OPTIONS: dict[str, dict[str, Any]] = {
    "prompt": {
        "metavar": "TEXT",
        "action": "append",
        "help": "a prompt; repeat for more",
    },
    "transformer": TRANSFORMER,
    "output": {"metavar": "FILE", "default": "sample.png", "help": "PNG to write (default: %(default)s)"},
    "num_images": {
        "metavar": "N",
        "type": int,
        "default": 4,
        "help": "pictures for each prompt (default: %(default)s)",
    },
}
TAKES_CONFIG = True


def run(options: argparse.Namespace, config: AlignConfig) -> int:
    """Check the arguments, then draw."""
    if not options.prompt:
        raise UsageError("sample needs a prompt: --prompt TEXT, repeated for more")
    prompts = [prompt.text for prompt in load_prompts(options.prompt, key="--prompt")]
    output = Path(options.output)
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output '{output}' must end in .png")
    if not output.parent.is_dir():
        raise UsageError(f"--output '{output}': folder '{output.parent}' does not exist")
    if options.num_images < 1:
        raise UsageError(f"--num_images {options.num_images}: give 1 or more")
    transformer = transformer_folder(options.transformer)
    load_libraries(config)
    from leapalign.evaluation.sampling import sample_command

    print(sample_command(config, transformer, prompts, output, num_images=options.num_images))
    return DONE
