"""Prompts with their metadata, from text files, JSON lines, the packaged shapes world or a `datasets` id."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leapalign.errors import UsageError

_SOURCES = "a .txt file (one prompt a line), a .jsonl file (objects with 'prompt'), shapes:train or a `datasets` id"


@dataclass(frozen=True)
class Prompt:
    """One prompt. `metadata` holds what else its source says of it, e.g. category and objects of a shapes scene."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(source: str | Path | Sequence[str] | None, *, key: str = "prompts") -> list[Prompt]:
    """Read prompts in their order; blank lines are passed over.

    Args:
        source: path of a ``.txt`` file (one prompt a line) or a ``.jsonl`` file (one object a line; "prompt" is the
            text, the other keys are the metadata); ``shapes:train`` or ``shapes:validation``; a list of prompts; or
            the id of a data set whose train split has a column "prompt" (needs the package `datasets`).
        key: the setting that names the source, for messages.

    Raises:
        UsageError: no source, no such file, a line that cannot be read, or no prompt in it.
    """
    if source is None:
        raise UsageError(f"{key} is not set; give {_SOURCES}")
    if isinstance(source, str | Path):
        prompts = _read(str(source), key)
    else:
        prompts = [Prompt(text.strip()) for text in source if text.strip()]
    if not prompts:
        shown = f"'{source}'" if isinstance(source, str | Path) else "the list"
        raise UsageError(f"{key}: {shown} has no prompts; give at least one")
    return prompts


def _read(source: str, key: str) -> list[Prompt]:
    if source.startswith("shapes:"):
        return _shapes(source, key)
    path = Path(source).expanduser()
    if path.is_dir():
        raise UsageError(f"{key}: '{source}' is a folder; give {_SOURCES}")
    if not path.exists() and path.suffix not in (".txt", ".jsonl") and not source.startswith((".", "/", "~")):
        return _dataset(source, key)
    if not path.exists():
        raise UsageError(f"{key}: file '{source}' does not exist")
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"{key}: '{source}' is neither .txt nor .jsonl; give {_SOURCES}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UsageError(f"{key}: '{source}' is not UTF-8 text") from None
    if path.suffix == ".txt":
        return [Prompt(line.strip()) for line in lines if line.strip()]
    return [_json_line(line, f"{key}: {source}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _json_line(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error.msg}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise UsageError(f'{where} has no \'prompt\'; write {{"prompt": "a red circle"}}')
    return Prompt(entry.pop("prompt").strip(), entry)


def _shapes(source: str, key: str) -> list[Prompt]:
    from leapalign.zoo.shapes import prompts as shapes

    splits = {"shapes:train": shapes.train_prompts, "shapes:validation": shapes.validation_prompts}
    if source not in splits:
        raise UsageError(f"{key}: '{source}' is not a split of shapes; give shapes:train or shapes:validation")
    entries = splits[source]()
    return [Prompt(entry["prompt"], {k: v for k, v in entry.items() if k != "prompt"}) for entry in entries]


def _dataset(source: str, key: str) -> list[Prompt]:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{key}: '{source}' is no file, and data set ids need the package `datasets`; "
            "run `pip install datasets`, or give a .txt or .jsonl file"
        ) from None
    rows = datasets.load_dataset(source, split="train")
    if "prompt" not in rows.column_names:
        raise UsageError(f"{key}: data set '{source}' has no column 'prompt' but {', '.join(rows.column_names)}")
    return [Prompt(text.strip()) for text in rows["prompt"] if text and text.strip()]
