"""Tables of the report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GIB = 2**30
NOTHING = "not measured"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Head and rows, so many columns left, the others right; `heads[0]` may be empty."""
    lines = [f"| {' | '.join(heads)} |", "|---" * left + "|---:" * (len(heads) - left) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def gib(number: float | None, digits: int = 1) -> str:
    """Bytes in GiB, or MiB where that is less than one."""
    if number is None:
        return ""
    if number < GIB:
        return f"{number / 2**20:.{digits}f} MiB"
    return f"{number / GIB:.{digits}f} GiB"


def mean_and_error(value: Mapping[str, float], scale: float, digits: int) -> str:
    """Signed mean ± standard error."""
    return f"{scale * value['mean']:+.{digits}f} ± {scale * value['standard_error']:.{digits}f}"


def command(results: Sequence[Mapping[str, Any]]) -> str:
    """How the results are made again."""
    commands = list(dict.fromkeys(result["command"] for result in results))
    if len(commands) == 1:
        return f"Command: `{commands[0]}`."
    return "Commands:\n\n" + "\n".join(f"- `{each}`" for each in commands)


def device(result: Mapping[str, Any]) -> str:
    """What a result's "device" is: the GPU's name, or threads and processor."""
    return threads(result["machine"]) if result["device"] == "cpu" else str(result["device"])


def made_on(result: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Machine and versions of a result, as bench/record.py writes them; of doctor's, which calls its rates so, too."""
    if "rates" not in result:
        return result.get("machine", {}), result.get("versions", {})
    gpu = (result["gpu"] or {}).get("name")
    return {**result["host"], "gpu": gpu}, result["software"]


def threads(machine: Mapping[str, Any]) -> str:
    """Threads and processor, or the GPU."""
    if machine.get("gpu"):
        return str(machine["gpu"])
    number = machine["threads"]
    return f"{number} thread{'s' * (number > 1)} of {machine['cpu']}"
