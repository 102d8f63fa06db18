"""Starts trainer processes within a second by forking this process, which has already imported the trainer.

A forked process has its own session and environment, and calls `narrow_main`, which runs the trainer
with a narrow network.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from data_prep.parent import signal_on_death_of_parent
from tests.support.forked import free_port, rank_environment
from tests.support.processes import becomes_true

GRACE_SECONDS = 30.0  # how long a launcher waits between SIGTERM and SIGKILL
RAISES = signal.SIGALRM  # makes a child raise an exception; the trainer does not handle this signal itself


class Child:
    """A forked process. As in subprocess, `returncode` is negative if a signal has ended the process."""

    def __init__(self, work: Callable[[], int], log: Path, env: dict[str, str]) -> None:
        self.log = log
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(work, log, env)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise RuntimeError(f"signal {number}")


def _become(work: Callable[[], int], log: Path, env: dict[str, str]) -> None:
    """Runs `work` in the child and ends the process. Never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(RAISES, _raise)
        signal_on_death_of_parent(signal.SIGKILL)
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ.update(env)
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Job:
    """One run with one or more ranks. If a rank fails, `wait` ends all of them, as a launcher does."""

    def __init__(self, arguments: Sequence[str | Path], log: Path, *, processes: int = 1, device: str = "cpu") -> None:
        from tests.support.workers.narrow_train import narrow_main

        def work() -> int:
            return narrow_main(["smoke", "--device", device, *map(str, arguments)])

        log.touch()
        port = free_port()
        self.started = time.monotonic()
        self.ranks = [
            Child(work, log, {} if processes == 1 else rank_environment(rank, processes, port))
            for rank in range(processes)
        ]

    def running(self) -> bool:
        return any(rank.poll() is None for rank in self.ranks)

    def wait(self, seconds: float = 240.0, *, grace: float = GRACE_SECONDS) -> list[int | None]:
        """Waits until all ranks have ended; returns their exit statuses, or None for a rank that had to be killed.

        `grace`: seconds for the other ranks to end after one has failed.
        """
        deadline, failed_at = time.monotonic() + seconds, 0.0
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.02)
            failed = any(rank.poll() not in (None, 0) for rank in self.ranks)
            if failed and not failed_at:
                failed_at = time.monotonic()
                for rank in self.ranks:
                    rank.send(signal.SIGTERM)
            if failed_at and time.monotonic() - failed_at > grace:
                break
        codes = [rank.poll() for rank in self.ranks]
        self.kill()
        return codes

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits until `condition()` is true, the job has ended or two minutes have passed.

        Returns whether the condition is true.
        """
        return becomes_true(condition, 120, running=self.running, pause=0.001)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.send(signal.SIGKILL)
        while self.running():
            time.sleep(0.01)
