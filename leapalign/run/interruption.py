"""Signals as a polite request: the first SIGINT or SIGTERM is noted, the second ends the process as usual."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ENDS: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_NOTICE = b"\nfinishing what is under way, then a checkpoint; once more ends at once\n"


class Interruption:
    """A context in which a signal only sets `requested`; outside the main thread signals stay as they are.

    Inside, the second signal ends the process, so that a step which hangs can be left. It does so even where the signal
    was ignored before, as it is in a process that a shell script started in the background.
    """

    def __init__(self) -> None:
        self.requested = False
        self._usual = {number: signal.getsignal(number) for number in _SIGNALS}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for one, usual in self._usual.items():
            signal.signal(one, _ENDS[one] if usual is signal.SIG_IGN else usual)
        os.write(2, _NOTICE)  # print may be in the middle of a line here

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
