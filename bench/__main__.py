"""`python -m bench WHAT`: the measurements behind every number that the project states, in bench/results/."""

from __future__ import annotations

import argparse
import sys

from bench import memory, quality, report


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    quality.add_arguments(commands.add_parser("quality", help=quality.SUMMARY, description=quality.__doc__))
    memory.add_arguments(commands.add_parser("memory", help=memory.SUMMARY, description=memory.__doc__))
    commands.add_parser("report", help=report.SUMMARY, description=report.__doc__)
    options, overrides = parser.parse_known_args(arguments)
    return {"quality": quality.run, "memory": memory.run, "report": report.run}[options.what](options, overrides)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
