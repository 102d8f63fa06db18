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


def wait_until(
    condition: Callable[[], object], what: str | Callable[[], str], seconds: float = 400, pause: float = 0.2
) -> None:
    """Waits until `condition()` is true. Raises TimeoutError after `seconds`.

    `what`: a text for the error message, or a function that returns it.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out after {seconds:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(pause)
