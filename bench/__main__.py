"""`python -m bench WHAT`: the measurements behind every number that the project states, in bench/results/."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

COMMANDS = (
    "quality",
    "memory",
    "optimizers",
    "curves",
    "bits",
    "kernels",
    "host-optimizer",
    "throughput",
    "gpu",
    "report",
)


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    chosen = [name for name in COMMANDS if name in arguments[:1]]
    for name in chosen or COMMANDS:  # only what is run is loaded: diffusers alone takes seconds
        module = _module(name)
        command = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        if name != "report":
            module.add_arguments(command)
    options, overrides = parser.parse_known_args(arguments)
    code: int = _module(options.what).run(options, overrides)
    return code


def _module(name: str) -> Any:
    return import_module(f"bench.{name.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
