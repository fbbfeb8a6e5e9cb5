"""The result file of `python -m bench gpu`: its name, its command, and whether a run may go on with it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import sources

RESULTS = Path(__file__).parents[1] / "results"
_NAMED = 3  # changed files that are named
_NEW = "leave --resume out: a new file is written"


def read(path: Path, tiny: bool) -> dict[str, Any]:
    """What a run is to go on with.

    Raises:
        ValueError: it is no such file, of other sizes, or was measured of code that has changed since.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        found["stages"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"resume={path} is no file that bench gpu wrote") from None
    if found.get("tiny") != tiny:
        raise ValueError(f"resume={path} was {'' if found.get('tiny') else 'not '}made with --tiny: do the same")
    # the report shows no rows of mixed code, so minutes would be spent on nothing
    if changed := sources.changed("gpu", found.get("sources") or {}):
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        raise ValueError(f"resume={path} was measured before {', '.join(changed[:_NAMED])}{more} changed; {_NEW}")
    return found


def other_machine(before: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """In one line that what is there was measured on another GPU or with another torch; None if it was not.

    Args:
        before, here: {"gpu": {"name"} or None, "versions": {"torch"}}; a file without rows may have neither.
    """
    if "versions" not in before or _spelled(before) == _spelled(here):
        return None
    return f"the file of --resume is of {_spelled(before)}, this is {_spelled(here)}; {_NEW}"


def _spelled(result: Mapping[str, Any]) -> str:
    return f"{(result.get('gpu') or {'name': 'no GPU'})['name']} with torch {result['versions'].get('torch')}"


def new(gpu: str) -> Path:
    """bench/results/<gpu>-<date>.json, with a number if there is one already."""
    name = f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{datetime.now(UTC).date().isoformat()}"
    paths = (RESULTS / f"{name}{f'-{number}' if number > 1 else ''}.json" for number in range(1, 1000))
    return next(path for path in paths if not path.exists())


def stages_of(result: Mapping[str, Any], stages: Sequence[str]) -> set[str]:
    """Those that a file's command asked for; none where it has no command."""
    words = shlex.split(result.get("command", ""))
    if "--stages" in words:
        return set(words[words.index("--stages") + 1].split(",")) & set(stages)
    return set(stages) if words else set()


def command(
    chosen: Collection[str], stages: Sequence[str], *, minutes: float, tiny: bool, resume: Path | None = None
) -> str:
    """What is typed for the stages `chosen` of all `stages`."""
    some = [name for name in stages if name in chosen]
    words = ["--resume", str(resume)] if resume else []
    words += ["--stages", ",".join(some)] if some != list(stages) else []
    words += ["--minutes", f"{minutes:g}", *(["--tiny"] if tiny else [])]
    return shlex.join(["python", "-m", "bench", "gpu", *words])
