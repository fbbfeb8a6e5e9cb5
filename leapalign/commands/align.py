"""`leapalign align`: align all parameters of a pipeline's transformer with a reward."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from leapalign.commands.codes import DONE, INTERRUPTED
from leapalign.commands.libraries import load_libraries
from leapalign.config.loading import AlignConfig, check_output_dir
from leapalign.data.prompts import load_prompts

TEXT = "align all parameters of a pipeline's transformer with a reward"
OPTIONS: dict[str, dict[str, Any]] = {}
TAKES_CONFIG = True


def run(_: argparse.Namespace, config: AlignConfig) -> int:
    """Check what can be checked without torch, then train; the exit code says whether it was interrupted."""
    checkpoint = check_output_dir(config)
    load_prompts(config.train_prompts, key="train_prompts")
    if config.validation_prompts is not None:
        load_prompts(config.validation_prompts, key="validation_prompts")
    load_libraries(config)
    if config.resume_from_checkpoint:
        start = f"going on from {checkpoint}" if checkpoint else "its run has no checkpoint yet; starting at step 0"
        print(f"leapalign: {config.output_dir}: {start}", file=sys.stderr)
    from leapalign.run.trainer import Trainer

    outcome = Trainer(config).run()
    print(outcome.summary)
    if not outcome.interrupted:
        return DONE
    print(f"leapalign: interrupted; go on with:\n  {outcome.resume_command}", file=sys.stderr)
    return INTERRUPTED
