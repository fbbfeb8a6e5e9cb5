"""`python -m bench WHAT`: the measurements behind every number that the project states, in bench/results/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from bench import (
    bits,
    curves,
    host_optimizer,
    kernels,
    memory,
    optimizer_states,
    optimizers,
    quality,
    report,
    tracking,
)

COMMANDS: Mapping[str, Any] = {
    "quality": quality,
    "memory": memory,
    "optimizers": optimizers,
    "optimizer-states": optimizer_states,
    "curves": curves,
    "bits": bits,
    "kernels": kernels,
    "host-optimizer": host_optimizer,
    "tracking": tracking,
    "report": report,
}


def parser() -> argparse.ArgumentParser:
    """Of `python -m bench`, with a command for each benchmark."""
    found = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = found.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.SUMMARY, description=module.__doc__))
    return found


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; returns the exit code."""
    options, overrides = parser().parse_known_args(arguments)
    code: int = COMMANDS[options.what].run(options, overrides)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
