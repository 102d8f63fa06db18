"""SIGTERM and SIGUSR2 as a request to stop at the next step. Which steps those are is the loop's business."""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

# A launcher and its workers are often signalled together, and the launcher then passes its own signal on: what arrives
# within this time of the first signal is the same request, not a second one.
SAME_REQUEST_SECONDS = 0.5


class Preempted(Exception):
    """The run was asked to stop; its state is saved."""


class StopRequest:
    """Whether this process was asked to stop. A second signal ends the process at once."""

    def __init__(self) -> None:
        self._first_at: float | None = None

    @property
    def pending(self) -> bool:
        return self._first_at is not None

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        elif now - self._first_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
