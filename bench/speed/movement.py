"""What copies cost a step: bytes by direction, the time they take, and the part of it that compute stood waiting.

    overlap = 1 - exposed / copying

`copying` is the time of all copies, both directions added; `exposed` the time for which the stream that computes had
nothing to do but wait for one of them. On a GPU both are measured by events: around every copy in its own stream, and
around every wait in compute's, where the second event is late by just as long as the wait took. On a CPU they are wall
time, of the copying threads and of the calling thread. `blocked` is the wall time for which the calling thread waited
in the host's name (before it reads or writes what was copied): while it does, it launches nothing.

Thousands of events disturb what they measure, so a step that is watched is not one that is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from leapalign.engine.planning.rates import Stamp
from leapalign.engine.streaming.queues import Event, Queue
from leapalign.engine.streaming.streamer import Buffer, Streamer

Span = tuple[Stamp, Stamp]


@dataclass(frozen=True)
class Movement:
    """Of what was watched. Bytes and seconds.

    Attributes:
        h2d_bytes, d2h_bytes: copied to and from the device.
        h2d_seconds, d2h_seconds: of these copies.
        exposed_seconds: for which compute waited for a copy.
        blocked_seconds: for which the calling thread did.
        overlap: see above; None if nothing was copied.
    """

    h2d_bytes: int
    d2h_bytes: int
    h2d_seconds: float
    d2h_seconds: float
    exposed_seconds: float
    blocked_seconds: float

    @property
    def overlap(self) -> float | None:
        copying = self.h2d_seconds + self.d2h_seconds
        return 1 - self.exposed_seconds / copying if copying > 0 else None


class Watch:
    """Made by `watched`; `movement` is to be asked for once, at the end."""

    def __init__(self, streamer: Streamer) -> None:
        self._streamer = streamer
        self._before = dict(streamer.copied)
        self._copies: dict[str, list[Span]] = {"in": [], "out": []}
        self._waits: list[Span] = []
        self._blocked = 0.0

    def movement(self) -> Movement:
        """What was copied and waited for since the watch began; blocks until all of it is done."""
        self._streamer.drain()
        if self._streamer.device.type == "cuda":
            torch.cuda.synchronize(self._streamer.device)  # the last wait may be under way in compute's stream
        copied = {name: self._streamer.copied[name] - self._before[name] for name in ("in", "out")}
        seconds = {name: _sum(spans) for name, spans in self._copies.items()}
        return Movement(
            copied["in"], copied["out"], seconds["in"], seconds["out"], _sum(self._waits), self._blocked
        )  # fmt: skip

    def _timed_copy(self, name: str, queue: Queue) -> Callable[..., None]:
        copy, spans = queue.copy, self._copies[name]

        def timed(pairs: Sequence[Any]) -> None:
            begin = Stamp(queue)
            copy(pairs)
            spans.append((begin, Stamp(queue)))

        return timed

    def _timed_wait(self, compute: Queue) -> Callable[..., None]:
        wait = self._streamer._wait

        def timed(name: str, kind: str, buffer: Buffer, event: Event) -> None:
            if (
                name not in ("compute", "host") or kind == "updated"
            ):  # copies that wait for another cost compute nothing
                wait(name, kind, buffer, event)
                return
            begin = Stamp(compute if name == "compute" else None)
            wait(name, kind, buffer, event)
            end = Stamp(compute if name == "compute" else None)
            if name == "compute":
                self._waits.append((begin, end))
            else:
                self._blocked += end.after(begin)

        return timed


@contextmanager
def watched(streamer: Streamer) -> Iterator[Watch]:
    """Every copy and every wait of the streamer inside the block is timed."""
    watch = Watch(streamer)
    queues: dict[str, Any] = {name: streamer._queues[name] for name in ("in", "out")}
    for name, queue in queues.items():
        queue.copy = watch._timed_copy(name, queue)
    streamer._wait = watch._timed_wait(streamer._queues["compute"])  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        for each in (*queues.values(), streamer):
            vars(each).pop("copy" if each is not streamer else "_wait")


def _sum(spans: Sequence[Span]) -> float:
    return sum(end.after(begin) for begin, end in spans)
