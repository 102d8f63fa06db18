"""Output that never makes a command fail.

Light on purpose: `doctor` uses it on a Python without any package.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any, TextIO


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Within the block, stdout and stderr never raise: the reader of a pipe may be gone, and a disk may be full.

    The first failure silences the stream. Letters that its encoding lacks are printed as escapes.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_ForgivingStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _ForgivingStream:
    """A text stream whose `write` and `flush` never raise."""

    def __init__(self, stream: TextIO | None) -> None:
        if stream is None:  # closed by whoever started this process
            stream = open(os.devnull, "w")  # noqa: SIM115
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def write(self, text: str) -> int:
        with self._silenced_by_failure():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silenced_by_failure():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _silenced_by_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream is closed
            with contextlib.suppress(OSError, ValueError):  # what is still in its buffer must go somewhere at the exit
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
