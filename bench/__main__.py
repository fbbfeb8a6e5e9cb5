"""`python -m bench WHAT`: the measurements behind every number that the project states, in bench/results/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

GROUPS = {  # what is measured -> {command: its module}
    "training": {name: f"training.{name}" for name in ("quality", "curves", "optimizers", "tracking", "bits")},
    "memory": {
        "memory": "memory.command",
        "optimizer-states": "memory.optimizer_states",
    },
    "speed": {
        "throughput": "speed.throughput",
        "host-optimizer": "speed.host_optimizer",
        "kernels": "kernels.command",
    },
    "all at once": {"gpu": "gpu.command"},
    "documents": {"report": "report.command"},
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; returns the exit code."""
    # Only what is run is loaded: diffusers alone takes seconds.
    chosen = [name for name in COMMANDS if name in arguments[:1]]
    options, overrides = parser(chosen or COMMANDS).parse_known_args(arguments)
    code: int = _module(options.what).run(options, overrides)
    return code


def parser(names: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """Of `python -m bench` with these commands."""
    found = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = found.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name in names:
        module = _module(name)
        module.add_arguments(commands.add_parser(name, help=module.SUMMARY, description=module.__doc__))
    return found


def _module(name: str) -> Any:
    return import_module(f"bench.{COMMANDS[name]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
