"""`python -m bench WHAT`: the measurements behind every number that the project states, in bench/results/."""

from __future__ import annotations

import argparse
import sys

from bench import bits, curves, kernels, memory, optimizer_states, optimizers, quality, report


def parser() -> argparse.ArgumentParser:
    """Of `python -m bench`, with a command for each benchmark."""
    found = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = found.add_subparsers(dest="what", required=True, metavar="WHAT")
    quality.add_arguments(commands.add_parser("quality", help=quality.SUMMARY, description=quality.__doc__))
    memory.add_arguments(commands.add_parser("memory", help=memory.SUMMARY, description=memory.__doc__))
    optimizers.add_arguments(commands.add_parser("optimizers", help=optimizers.SUMMARY, description=optimizers.__doc__))
    optimizer_states.add_arguments(
        commands.add_parser("optimizer-states", help=optimizer_states.SUMMARY, description=optimizer_states.__doc__)
    )
    curves.add_arguments(commands.add_parser("curves", help=curves.SUMMARY, description=curves.__doc__))
    bits.add_arguments(commands.add_parser("bits", help=bits.SUMMARY, description=bits.__doc__))
    kernels.add_arguments(commands.add_parser("kernels", help=kernels.SUMMARY, description=kernels.__doc__))
    commands.add_parser("report", help=report.SUMMARY, description=report.__doc__)
    return found


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; returns the exit code."""
    options, overrides = parser().parse_known_args(arguments)
    runs = {
        "quality": quality.run,
        "memory": memory.run,
        "optimizers": optimizers.run,
        "optimizer-states": optimizer_states.run,
        "curves": curves.run,
        "bits": bits.run,
        "kernels": kernels.run,
        "report": report.run,
    }
    return runs[options.what](options, overrides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
