"""The examples run as they are printed, and what they train gets better."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BETTER = {"torch_loop": ("reward", 1), "accelerate_loop": ("loss", -1), "flow_matching": ("loss", -1)}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_learns(name: str, tmp_path: Path) -> None:
    words = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "6"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    what, sign = BETTER[name]
    values = [float(found) for found in re.findall(rf"{what} (-?\d+\.\d+)", done.stdout)]
    assert len(values) == 6
    assert sign * (values[-1] - values[0]) > 0, done.stdout
