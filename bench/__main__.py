"""`python -m bench WHAT`: the measurements behind every number that the project states, in bench/results/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from importlib import import_module

GROUPS = {  # what is measured -> {command: (its module, what it says)}
    "training": {
        "quality": ("training.quality", "reward and rule-based accuracy before and after alignment, over seeds"),
        "curves": (
            "training.curves",
            "reward curves: 8-bit AdamW with bfloat16 weights, fused kernels, beside float32",
        ),
        "optimizers": ("training.optimizers", "8-bit AdamW, stochastic rounding, beside float32 and round-to-nearest"),
        "tracking": ("training.tracking", "8-bit AdamW over 1,000 steps of flow matching, beside others"),
        "bits": ("training.bits", "bits and distances of the weights, with one decision of the plan changed at a time"),
    },
    "memory": {
        "memory": ("memory.command", "device memory of one step on real shapes, and against trajectory length"),
        "optimizer-states": ("memory.optimizer_states", "bytes a parameter that optimizers keep, ours beside others"),
    },
    "speed": {
        "throughput": (
            "speed.throughput",
            "seconds of a step by phase: streamed under caps, resident, a plain trainer",
        ),
        "host-optimizer": ("speed.host_optimizer", "parameters a second of the 8-bit AdamW in C++ beside others"),
        "kernels": ("kernels.command", "the Triton kernels: compiled for every GPU without one, or timed on one"),
    },
    "all at once": {
        "gpu": ("gpu.command", "every measurement that needs a GPU, in stages and within minutes; --tiny needs none"),
    },
    "documents": {
        "report": ("report.command", "write docs/benchmarks.md, its figures and README's tables from the results"),
    },
}
COMMANDS = {name: found for group in GROUPS.values() for name, found in group.items()}


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; without one list them; returns the exit code."""
    if not arguments:
        print(f"{__doc__}\n\n{listed()}", file=sys.stderr)
        return 2
    # Only what is run is loaded: diffusers alone takes seconds.
    chosen = [name for name in COMMANDS if name in arguments[:1]]
    options, overrides = parser(chosen).parse_known_args(arguments)
    code: int = import_module(f"bench.{COMMANDS[options.what][0]}").run(options, overrides)
    return code


def listed() -> str:
    """Every command in its group."""
    lines = []
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:18}{summary}" for name, (_, summary) in commands.items())]
    return "\n".join(lines)


def parser(names: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """Of `python -m bench` with the options of these commands; its help lists all."""
    found = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{__doc__}\n\n{listed()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(names)
    commands = found.add_subparsers(
        dest="what", required=True, metavar="WHAT", help="--help after it tells its options"
    )
    for name in COMMANDS:
        if name not in names:
            commands.add_parser(name)
            continue
        module = import_module(f"bench.{COMMANDS[name][0]}")
        module.add_arguments(commands.add_parser(name, description=module.__doc__))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
