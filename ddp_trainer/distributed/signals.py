"""SIGTERM, SIGUSR2 and Ctrl-C as a request to stop at the next step. Which steps those are is the loop's business.

Light on purpose: `train` installs the handlers before it imports anything that takes seconds.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

# A launcher and its workers are often signalled together, and the launcher then passes its own signal on: what arrives
# within this time of the first signal is the same request, not a second one.
SAME_REQUEST_SECONDS = 2.0

# One of these is set for a process that accelerate or torchrun started.
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
PR_SET_PDEATHSIG = 1


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
        on_request_to_stop(self._on_signal)
        stop_with_the_launcher()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            if number == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":  # who pressed it is watching
                with contextlib.suppress(OSError):  # a pipe whose reader got the Ctrl-C too
                    os.write(2, b"\nstopping after the step at hand; Ctrl-C again ends at once\n")
        elif now - self._first_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def on_request_to_stop(handler: Callable[[int, FrameType | None], None]) -> None:
    """Has `handler` called for each of SIGNALS. SIGINT stays ignored where it is: in a script's background job."""
    for number in SIGNALS:
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def stop_with_the_launcher() -> None:
    """Has the kernel send this process SIGTERM when the launcher that started it is gone.

    `accelerate launch` with one process passes no signal on, and torchrun none but SIGTERM and its like: a launcher
    that dies would leave its training behind. A process started by hand is let be: it may outlive its shell.
    """
    if any(name in os.environ for name in LAUNCHER_VARIABLES):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def exit_process(status: int) -> None:
    """Ends this process. After a failure at once: waiting for another rank that is gone may take forever."""
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(0)
