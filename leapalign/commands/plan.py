"""`leapalign plan`: what a run would hold, move and take, from the shapes of its models alone."""

from __future__ import annotations

import argparse
import json
from typing import Any

from leapalign.commands.codes import DONE
from leapalign.commands.libraries import quiet
from leapalign.config.loading import AlignConfig

TEXT = (
    "say what a run would hold, move and take, phase by phase, within --vram and --ram (default: no limit), "
    "from the shapes of its models alone"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "machine": {
        "metavar": "FILE",
        "help": "rates of the machine: what `leapalign doctor --output FILE` wrote, or JSON with flops_per_s, "
        "h2d_bytes_per_s and so on (default: an RTX 4090 on PCIe 4.0 x16)",
    },
    "json": {"action": "store_true", "help": "print JSON instead of a table"},
}
TAKES_CONFIG = True


def run(options: argparse.Namespace, config: AlignConfig) -> int:
    """Print the plan as a table or JSON."""
    quiet()
    from leapalign.engine.planning.workload import Machine
    from leapalign.planning.report import plan_command

    result = plan_command(config, Machine.read(options.machine) if options.machine else Machine())
    text = result.pop("table")
    print(json.dumps(result, indent=2) if options.json else text)
    return DONE
