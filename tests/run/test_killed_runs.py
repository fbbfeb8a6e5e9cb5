"""SIGKILL at random moments, and the run that goes on ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def test_killed_at_20_random_moments_and_resumed_every_bit_is_the_same(tmp_path: Path) -> None:
    """Ten of them while a checkpoint or the result is written."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.killed_runs", str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 20
    for moment in found:
        assert moment["signal"] == signal.SIGKILL, moment
        assert moment["same"], moment
        assert not moment["hidden"], moment  # remains of the broken attempt are gone
    assert any(".unfinished" in name for moment in found for name in moment["left"])  # some were killed in a save
