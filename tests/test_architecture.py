"""docs/architecture.md names files, folders and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\| [^|]+ \| `([\w/]+\.py)` \| ([^|]+) \|", PAGE, re.MULTILINE)


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, methods as Class.method."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_table_was_found() -> None:
    assert len(STEPS) > 10
    assert (STEPS[0][0], "Trainer._train_step" in STEPS[0][1]) == ("leapalign/run/trainer.py", True)


@pytest.mark.parametrize(("file", "functions"), STEPS)
def test_every_step_is_where_the_page_says(file: str, functions: str) -> None:
    names = set(re.findall(r"`([\w.]+)`", functions))
    assert names and names <= defined(ROOT / file), f"docs/architecture.md: {file} does not define all of {names}"


def test_every_room_is_there() -> None:
    rooms = re.findall(r"^\| (`[\w/` ]+/`) \|", PAGE, re.MULTILINE)
    assert len(rooms) > 15
    for cell in rooms:
        first, *others = re.findall(r"`([\w/]+)/`", cell)
        layer = first.partition("/")[0]
        for folder in (first, *(f"{layer}/{other}" for other in others)):
            assert (ROOT / folder / "__init__.py").is_file(), f"docs/architecture.md: there is no {folder}/__init__.py"
