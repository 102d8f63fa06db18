"""Stops a command when a signal arrives, so that its incomplete files are removed."""

import signal
import threading
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopper:
    """Within the block, raises SystemExit when one of SIGNALS arrives, and ignores later signals.

    C code such as NumPy's `tofile` may swallow the exception of a signal handler, so the signal number is stored, too.
    SIGINT and SIGHUP stay ignored if they are, as under nohup or in a script's background job. After the block, the
    previous handlers are restored. Outside the main thread, Python handles no signals, and neither does this class.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                previous = signal.getsignal(number)
                is_kept = previous == signal.SIG_IGN and number != signal.SIGTERM
                if not is_kept and previous is not None:  # None: the handler was installed by C code
                    self._previous[number] = previous
                    signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _stop(self, number: int, frame: object) -> NoReturn:
        for each in self._previous:
            signal.signal(each, signal.SIG_IGN)
        self.number = number
        raise SystemExit(128 + number)

    def check(self) -> None:
        """Raises SystemExit if a signal has arrived."""
        if self.number:
            raise SystemExit(128 + self.number)
