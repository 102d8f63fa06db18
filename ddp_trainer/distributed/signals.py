"""Turns signals into a request to stop, which the training loop obeys between two steps.

This file imports only fast modules, because `train` must handle signals before it imports anything that takes seconds.
"""

import _thread
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from data_prep.parent import signal_on_death_of_parent

# These two signals are handled even if they were ignored or blocked when the process started: a job script may ignore
# them while it starts the launcher, and the training processes inherit that.
ALWAYS_HANDLED = (signal.SIGTERM, signal.SIGUSR2)

# Other signals that ask a process to end: Ctrl-C, a closed terminal, a warning from a batch system, a CPU time limit.
# If they were ignored when the process started, as under nohup or in a script's background job, they stay ignored.
OTHER_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
SIGNALS = (*ALWAYS_HANDLED, *OTHER_SIGNALS)

# A launcher and its workers often receive a signal at the same time, and the launcher then sends another one to the
# workers. So a signal that arrives within this time after the first one counts as the same request.
SAME_REQUEST_SECONDS = 2.0

# At least one of these variables is set in a process that accelerate or torchrun started.
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")

CTRL_C_MESSAGE = b"\nstopping after the current step; press Ctrl-C again to stop at once\n"
THREAD_MESSAGE = "signals are not handled: the trainer does not run in the main thread"

Handler = Callable[[int, FrameType | None], None]


class Preempted(Exception):
    """Raised on every rank after the run was asked to stop."""


class StopRequest:
    """Records whether this process was asked to stop.

    A signal that comes more than SAME_REQUEST_SECONDS after the first one ends the process at once, with exit status
    128 + the number of the signal.
    """

    def __init__(self, *, keeps_process: bool = False) -> None:
        """`keeps_process`: a second Ctrl-C raises KeyboardInterrupt instead of ending the process."""
        self._keeps_process = keeps_process
        # Whether KeyboardInterrupt must be raised, and whether it has been raised.
        self._interrupt, self._interrupted = False, False
        self._first_at: float | None = None
        self._number: int | None = None  # the number of the first signal
        self._ends_at_first_signal = False

    @property
    def pending(self) -> bool:
        return self._first_at is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, records requests to stop. Afterwards, restores the previous signal handlers."""
        if threading.current_thread() is not threading.main_thread():
            print(THREAD_MESSAGE, file=sys.stderr, flush=True)
            yield
            return
        with handle_signals(self._on_signal), _signal_numbers(self._on_arrival), stopping_with_the_launcher():
            yield

    def end_at_first_signal(self, enabled: bool) -> None:
        """While enabled, a single signal ends the process at once, even one that has arrived already.

        This is for the time in which there is nothing to save.
        """
        self._ends_at_first_signal = enabled
        if enabled and self._number is not None:
            os._exit(128 + self._number)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Records a request to stop. Python calls this in the main thread, but not while that thread runs C++ code."""
        if self._interrupt and not self._interrupted:
            self._interrupted = True
            raise KeyboardInterrupt
        if self._first_at is None:
            self._first_at = time.monotonic()

    def _on_arrival(self, number: int) -> None:
        """Handles a signal as soon as it arrives, in a separate thread, whatever the main thread is doing."""
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        # After the CPU time limit, the kernel sends SIGXCPU every second, so this signal is never a second request.
        is_second = self._number is not None and now - self._first_at > SAME_REQUEST_SECONDS
        if is_second and number == signal.SIGINT and self._keeps_process and not self._ends_at_first_signal:
            if not self._interrupt:  # `interrupt_main` simulates a SIGINT, which calls this method again
                self._interrupt = True
                _thread.interrupt_main()
        elif self._ends_at_first_signal or (is_second and number != signal.SIGXCPU):
            os._exit(128 + number)
        if self._number is None:
            self._number = number
            if number == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":  # somebody pressed Ctrl-C
                with contextlib.suppress(OSError):  # stderr may be a pipe whose reader was ended by Ctrl-C
                    if select.select([], [2], [], 0)[1]:  # a write to a full pipe would block this thread
                        os.write(2, CTRL_C_MESSAGE)


@contextlib.contextmanager
def handle_signals(handler: Handler) -> Iterator[None]:
    """Calls `on_request_to_stop(handler)`, and unblocks ALWAYS_HANDLED. Both are undone at the end of the block."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        on_request_to_stop(handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALWAYS_HANDLED)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, before in previous.items():
            if before is not None:  # None: the handler was installed by C code
                signal.signal(number, before)


def on_request_to_stop(handler: Handler) -> None:
    """Installs `handler` for each of SIGNALS, except for those of OTHER_SIGNALS that are ignored."""
    for number in SIGNALS:
        if number in ALWAYS_HANDLED or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def _signal_numbers(receive: Callable[[int], None]) -> Iterator[None]:
    """For each signal in SIGNALS that arrives within the block, a thread calls `receive` with its number.

    Python writes the number to a pipe immediately. In contrast, it calls no signal handler while the main thread runs
    C++ code, such as a wait for another process.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in SIGNALS:
                    receive(number)
        os.close(reader)

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)  # ends the thread, unless a forked child has the pipe open
        watcher.join(timeout=1.0)


@contextlib.contextmanager
def stopping_with_the_launcher() -> Iterator[None]:
    """Within the block, the kernel sends SIGTERM to this process when the launcher that started it ends.

    `accelerate launch` with one process does not pass signals on, and torchrun passes on only SIGTERM and a few others.
    So a launcher that is ended by a signal could leave its workers running. A process that was started without a
    launcher gets no SIGTERM, because it should be able to outlive its shell.
    """
    launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
    if launched:
        signal_on_death_of_parent(signal.SIGTERM)
    try:
        yield
    finally:
        if launched:
            signal_on_death_of_parent(0)
