"""`leapalign doctor`: measure this machine, say which presets fit and what will hurt."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leapalign.commands.codes import DONE
from leapalign.commands.libraries import quiet
from leapalign.errors import UsageError

TEXT = "measure this machine, say which presets fit and what will hurt"
OPTIONS: dict[str, dict[str, Any]] = {
    "json": {"action": "store_true", "help": "print JSON instead of a table"},
    "output": {"metavar": "FILE", "help": "write the JSON there, too: `leapalign plan --machine` reads it"},
    "seconds": {
        "metavar": "S",
        "type": float,
        "default": 0.5,
        "help": "of each measurement (default: %(default)s)",
    },
}
TAKES_CONFIG = False
MOST_SECONDS = 60  # of a measurement: beyond, nothing is more certain


def run(options: argparse.Namespace) -> int:
    """Measure, print, and write the JSON where --output says."""
    seconds, output = options.seconds, options.output and Path(options.output)
    if not 0 < seconds <= MOST_SECONDS:  # nan is neither
        raise UsageError(f"--seconds {seconds}: give more than 0 and at most {MOST_SECONDS}")
    if output and (output.suffix != ".json" or not output.parent.is_dir()):
        raise UsageError(f"--output '{output}': give a file NAME.json in a folder that exists")
    quiet()
    print("leapalign: measuring this machine and planning every preset for it", file=sys.stderr)
    result = doctor_command(seconds)
    table, text = result.pop("table"), json.dumps(result, indent=2)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    print(text if options.json else table)
    return DONE


def doctor_command(seconds: float) -> dict[str, Any]:
    """What `leapalign doctor --json` prints, and its "table".

    Args:
        seconds: of each measurement: products, copies, host, cores.
    """
    from leapalign.doctor.examination import examine
    from leapalign.doctor.report import table
    from leapalign.doctor.warnings import warnings
    from leapalign.families.source import resolve_device

    found = examine(resolve_device("auto"), Path.cwd(), seconds)
    head = {"date": datetime.now(UTC).date().isoformat(), "command": f"leapalign doctor --seconds {seconds:g}"}
    lines = warnings(found)
    return {**head, **found.as_dict(), "warnings": lines, "table": table(found, lines)}
