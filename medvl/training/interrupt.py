"""Signals that ask a run to stop: they are noted, and the loop saves its state before it raises `Stopped`."""

import os
import signal
import threading
import time
from types import FrameType

from medvl.base import processes


class Stopped(SystemExit):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state; the exit status is that of a
    process the signal ended."""


class Interrupt:
    """The signal, SIGTERM or SIGINT (Ctrl-C), that came in while the block lasts; 0 if none did.

    The step at work is finished and saved. A second Ctrl-C ends the process at once, as it would without
    this block. Only the main thread can catch signals; elsewhere this does nothing.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def __enter__(self) -> "Interrupt":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._main:
            # Handlers of whoever called are put back, also after an exception.
            for number, handler in self._before.items():
                signal.signal(number, handler)
        if self.number and kind is None:  # it came in after the last step was saved
            # 128 + number is how a shell reports a process that a signal ended.
            raise Stopped(128 + self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.number and number == signal.SIGINT
        # torchrun passes a Ctrl-C on to processes that the terminal has already sent it to: that is no
        # second one.
        if again and not (processes.world_size() > 1 and time.monotonic() - self._since < 1):
            raise KeyboardInterrupt
        # The first signal decides the exit status.
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if number == signal.SIGINT:
                # Not by logging: a handler may come in the middle of another line.
                os.write(
                    2,
                    b"\nstopping after this step, then saving; Ctrl-C again ends at once and loses "
                    b"what is not saved\n",
                )
