"""Seconds of an optimizer step by phase, images and TFLOP a second, and what was copied, beside the other ways to it.

Which ways there are: bench/speed/step_variants.py; how they are timed: bench/speed/step_timing.py. Weights are random,
sizes are real.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import record
from bench.speed.device_variants import Plain, Resident
from bench.speed.random_models import MODELS, tiny
from bench.speed.step_timing import Left, faults_of, machine_here, measured, outcome
from bench.speed.step_variants import (
    SEED,
    Streamed,
    Task,
    Way,
    cap_on,
    card_bytes,
    host_bytes,
    planner_of,
    streamed,
)
from bench.speed.throughput_text import table, told
from leapalign.engine.memory.sizes import parse_bytes
from leapalign.engine.planning.planner import Planner
from leapalign.engine.planning.workload import Budget

WAYS = ("streamed", "resident", "plain")
CAPS = "24GiB,48GiB"
SMALL_CAPS = "8MiB,1GiB"  # of shapes on a CPU: blocks have to be streamed in the first, in the second none has to
TINY_CAP = "3850KiB"  # in which blocks of the tiny model have to be streamed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench throughput`."""
    parser.add_argument("--model", choices=[name for name in MODELS if name != "tiny"], default="shapes")
    parser.add_argument("--blocks", help="D,S: only so many double and single blocks")
    parser.add_argument("--ways", default=",".join(WAYS), help="(default: %(default)s)")
    parser.add_argument(
        "--vram", help=f"device caps of the streamed way (default: {CAPS}; {SMALL_CAPS} for shapes on a CPU)"
    )
    parser.add_argument("--ram", help="host memory that plans may take (default, and at most: what is free)")
    parser.add_argument("--resolution", type=int, help="pixels a side (default: the model's)")
    parser.add_argument("--batch", type=int, help="images a step (default: the model's)")
    parser.add_argument("--steps", type=int, help="of the rollout (default: the model's)")
    parser.add_argument("--repeats", type=int, default=3, help="timed optimizer steps a way (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: what is measured means nothing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", metavar="NAME", help="also write bench/results/NAME.json")


def run(options: argparse.Namespace, unknown: list[str]) -> int:
    """Measure and print. Exit code 1 if a way failed or did wrong, 2 for wrong settings."""
    try:
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]}; see --help")
        measurement = _measurement(options)
    except ValueError as error:
        print(f"bench throughput: error: {error}", file=sys.stderr)
        return 2
    rows = []
    for row in measurement.rows():
        rows.append(row)
        print(told(row), file=sys.stderr, flush=True)
    settings = {"model": "tiny" if options.tiny else options.model, **measurement.task.described()}
    result = {"settings": settings, "device": measurement.device_name, **measurement.rates, "ways": rows}
    print(json.dumps(result, indent=1) if options.json else table(result))
    if options.output:
        path = record.write(options.output, ["throughput", *_command(options)], result, seeds=[SEED])
        print(f"wrote {path.name}", file=sys.stderr)
    return 1 if any("failed" in row or row.get("faults") for row in rows) else 0


# ---- a measurement ---------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """The ways of one task, one after the other.

    Attributes:
        ways: of WAYS.
        caps: of the streamed way, e.g. "24GiB".
        ram: host memory for the plans, of what is free when the measurement is made; None: all of that.
        repeats: timed steps a way, at most.
        left: the seconds that there are; what does not fit is made shorter.
        rates: of this machine, measured when the measurement is made.
    """

    task: Task
    ways: Sequence[str] = WAYS
    caps: Sequence[str] = ("24GiB", "48GiB")
    ram: str | None = None
    repeats: int = 3
    left: Left = lambda: float("inf")

    def __post_init__(self) -> None:
        self._machine, self.rates = machine_here(self.task.device)
        self._ram = host_bytes(self.ram)
        self._planner: Planner | None = None

    @property
    def device_name(self) -> str:
        device = self.task.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row a way."""
        yield from (self.row(name) for name in self.names())

    def names(self) -> list[str]:
        """Of the rows."""
        streamed = [f"streamed, {cap}" for cap in self.caps] if "streamed" in self.ways else []
        return [*streamed, *(way for way in WAYS[1:] if way in self.ways)]

    def row(self, name: str) -> dict[str, Any]:
        """What this way takes, or why there are no numbers: see `outcome`; and "refused" is a cap above the card."""
        way, _, cap = name.partition(", ")
        limit, card = parse_bytes(cap, "vram") if cap else None, card_bytes(self.task.device)
        kinds: dict[str, Callable[[], Way]] = {
            "streamed": lambda: self._streamed(limit or card),
            "resident": lambda: Resident(self.task),
            "plain": lambda: Plain(self.task),
        }
        head = {"way": name, "cap_bytes": limit, "ram_bytes": self._ram, "task": self.task.described()}
        if limit is not None:
            try:
                head["cap_bytes"] = limit = cap_on(card, limit)
            except ValueError as error:
                return head | {"refused": str(error)}

        def timed() -> dict[str, Any]:
            return measured(kinds[way], self.rates["matmul_flops_per_s"], self.repeats, self.left)

        found = outcome(timed, self.task.device, limit or card)
        return head | found | ({"faults": faults_of(found)} if "losses" in found else {})

    def _streamed(self, limit: int) -> Streamed:
        if self._planner is None:
            self._planner = planner_of(self.task, self._machine)
        return streamed(self.task, self._planner, limit, self._ram)


def _measurement(options: argparse.Namespace) -> Measurement:
    gpu = torch.cuda.is_available() and not options.tiny
    small = options.tiny or options.model == "shapes"
    if not (gpu or small or options.blocks):
        raise ValueError(f"model={options.model} needs a CUDA GPU, and torch sees none; --model shapes runs on a CPU")
    sizes = tiny() if options.tiny else MODELS[options.model]()
    if options.blocks is not None:
        counts = options.blocks.split(",")
        if len(counts) != 2 or not all(count.isdecimal() and int(count) for count in counts):
            raise ValueError(f"blocks={options.blocks}: give two numbers of at least 1, e.g. 5,10")
        sizes = sizes.with_blocks(*map(int, counts))
    ways = options.ways.split(",")
    for way in ways:
        if way not in WAYS:
            raise ValueError(f"ways={way} is unknown: choose from {', '.join(WAYS)}")
    caps = [TINY_CAP] if options.tiny else (options.vram or (CAPS if gpu or not small else SMALL_CAPS)).split(",")
    Budget(None, options.ram)
    for each in caps:
        parse_bytes(each, "vram")
    found = {}
    for name, least in (("resolution", sizes.patch), ("batch", 1), ("steps", 2), ("repeats", 1)):
        given = getattr(options, name)
        found[name] = getattr(sizes, name) if given is None else given
        if found[name] < least:
            raise ValueError(f"{name}={found[name]} must be at least {least}")
    if found["resolution"] % sizes.patch:
        raise ValueError(f"resolution={found['resolution']} must be a multiple of {sizes.patch} pixels")
    repeats = min(found.pop("repeats"), 1 if options.tiny else 100)
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    task = Task(sizes, device=device, microbatch=1 if options.tiny else None, **found)
    return Measurement(task, ways, caps, options.ram, repeats)


def _command(options: argparse.Namespace) -> list[str]:
    """The arguments that give this result again."""
    command = []
    for name, value in vars(options).items():
        if name not in ("what", "output") and value not in (None, False):
            command += [f"--{name}", *([] if value is True else [str(value)])]
    return command
