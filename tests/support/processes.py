"""Finds processes in /proc, and waits for conditions."""

import time
from collections.abc import Callable
from pathlib import Path


def read(pid: int, name: str) -> bytes:
    """Returns the content of /proc/PID/`name`, or empty bytes if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def processes_with(*words: str) -> list[int]:
    """Returns the ids of running processes that have each of `words` in their environment or command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            text = read(int(entry.name), "environ") + read(int(entry.name), "cmdline")
            if text and all(word.encode() in text for word in words):
                found.append(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    """Returns whether the process has not ended. A zombie has ended."""
    stat = read(pid, "stat")
    return bool(stat) and stat.rsplit(b")", 1)[1].split()[0] != b"Z"


def becomes_true(
    condition: Callable[[], object], seconds: float, *, running: Callable[[], bool] = lambda: True, pause: float = 0.02
) -> bool:
    """Waits until `condition()` is true, `running()` is false or `seconds` have passed.

    Returns whether the condition is true.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        if not running():
            return bool(condition())  # it may have become true just before the end
        time.sleep(pause)
    return True


def wait_until(
    condition: Callable[[], object], what: str | Callable[[], str], seconds: float = 400, pause: float = 0.2
) -> None:
    """Waits until `condition()` is true. Raises TimeoutError after `seconds`.

    `what`: a text for the error message, or a function that returns it.
    """
    if not becomes_true(condition, seconds, pause=pause):
        raise TimeoutError(f"timed out after {seconds:.0f} s: {what if isinstance(what, str) else what()}")
