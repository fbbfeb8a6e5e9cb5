"""Where the run is told: metrics.jsonl, TensorBoard, Weights & Biases, and the live line on the terminal.

metrics.jsonl is the record: a failure to write it is an error. TensorBoard and W&B are for looking: one that fails is
left out, with a warning, and the run goes on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.text import Text

from leapalign.config.keys import AlignConfig
from leapalign.engine.memory.checkpoint import write_atomically

METRICS_FILE = "metrics.jsonl"
LOG_FOLDER = "logs"
ETA_STEPS = 20  # the estimate follows the mean of so many steps
PLAIN_SECONDS = 10.0  # between lines where there is no terminal to redraw


class Tracker(Protocol):
    """A place that shows curves and pictures."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in logs/; after a resume, points beyond the checkpoint are hidden."""

    def __init__(self, output_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / LOG_FOLDER), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; a resumed run goes on under its id."""

    def __init__(self, output_dir: Path, config: AlignConfig) -> None:
        import wandb

        self._wandb = wandb
        id_file = output_dir / LOG_FOLDER / "wandb_id"
        known = id_file.read_text().strip() if id_file.is_file() else None
        self._run = wandb.init(
            project="leapalign",
            name=config.run_name or output_dir.name,
            id=known,
            resume="allow" if known else None,
            dir=str(output_dir / LOG_FOLDER),
            config=config.model_dump(mode="json"),
        )
        id_file.write_text(self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class Tracking:
    """All of them behind one door; a context manager that closes them.

    Args:
        resumed_step: the step the run goes on from; rows of later steps are removed from metrics.jsonl.
    """

    def __init__(self, config: AlignConfig, resumed_step: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._line = LiveLine(self._console, resumed_step, config.max_train_steps)
        output_dir = Path(config.output_dir)
        (output_dir / LOG_FOLDER).mkdir(parents=True, exist_ok=True)
        _keep_rows(output_dir / METRICS_FILE, resumed_step)
        self._metrics: IO[str] = (output_dir / METRICS_FILE).open("a", encoding="utf-8")
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(output_dir, resumed_step + 1),
            "wandb": lambda: WandB(output_dir, config),
        }
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(config.report_to):
            try:
                self._trackers[name] = makers[name]()
            except Exception as error:
                self.warn(f"{name} does not start ({error}); the run goes on without it")

    def __enter__(self) -> Tracking:
        self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()
        self._everywhere(lambda tracker: tracker.close())
        self._metrics.close()

    def log(self, row: Mapping[str, Any]) -> None:
        """One training step: a row of metrics.jsonl (non-finite numbers as null), curves, and the live line."""
        row = _finite(row)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        values = {f"train/{name}": value for name, value in row.items() if _is_number(value) and name != "step"}
        values |= {f"seconds/{phase}": value for phase, value in row["seconds"].items()}
        for phase, found in row.get("memory", {}).items():
            values |= {f"memory/{phase} {name}": value for name, value in found.items() if _is_number(value)}
        self._everywhere(lambda tracker: tracker.scalars(row["step"], values))
        self._line.show(row)

    def validation(self, step: int, values: Mapping[str, float], picture: Path) -> None:
        """The scores of a validation and its pictures."""
        named = {f"validation/{name}": value for name, value in values.items()}
        self._everywhere(lambda tracker: tracker.scalars(step, named))
        self._everywhere(lambda tracker: tracker.picture(step, "samples", picture))

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: the run comes there again."""
        path = Path(self._metrics.name)
        self._metrics.close()
        _keep_rows(path, step)
        self._metrics = path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Bring all rows to the disk: a checkpoint must not be newer than its rows."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def note(self, message: str) -> None:
        """A line above the live line."""
        self._console.print(Text(message))

    def warn(self, message: str) -> None:
        """A line above the live line that says what went wrong."""
        self._console.print(Text(f"warning: {message}", style="yellow"))

    def _everywhere(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                self.warn(f"{name} fails ({error}); the run goes on without it")


class LiveLine:
    """Step, reward, loss, seconds by phase and the time left: one redrawn line, or now and then a printed one."""

    def __init__(self, console: Console, step: int, last_step: int) -> None:
        self._console, self._last_step = console, last_step
        self._first = step + 1
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._recent: deque[float] = deque(maxlen=ETA_STEPS)  # seconds a step
        self._printed = -math.inf

    def start(self) -> None:
        if self._live:
            self._live.start()

    def stop(self) -> None:
        if self._live:
            self._live.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Replace the line by this step's."""
        self._recent.append(row["seconds"]["total"])
        text = self._text(row)
        if self._live:
            self._live.update(Text(text), refresh=True)
            return
        now = time.monotonic()
        if row["step"] in (self._first, self._last_step) or now - self._printed > PLAIN_SECONDS:
            self._printed = now
            self._console.print(text, soft_wrap=True)

    def _text(self, row: Mapping[str, Any]) -> str:
        left = (self._last_step - row["step"]) * sum(self._recent) / len(self._recent)
        seconds = row["seconds"]
        phases = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if name != "total")
        scores = (
            f"skipped: {row['reason']}" if row["skipped"] else f"reward {row['reward']:.4f}  loss {row['loss']:.4f}"
        )
        eta = timedelta(seconds=round(left))
        return f"step {row['step']}/{self._last_step}  {scores}  ETA {eta}  {seconds['total']:.2f} s ({phases})"


def _keep_rows(path: Path, step: int) -> None:
    """Drop the rows after `step`, and a line that a killed process did not finish."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
