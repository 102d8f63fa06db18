"""Keeps a command working when its output cannot be written.

The disk may be full, a pipe or a terminal may have been closed, or a stream may have been closed before the command
started. None of this changes what the command does. Only a command that checks `output_error` gets another exit status.
"""

from __future__ import annotations  # ddp_trainer.doctor imports this module, and runs on older Pythons, too

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Within the block, output errors are ignored: the first error on a stream silences that stream.

    Also works as a decorator for a command's `main`. On stdout, characters that the encoding lacks are escaped, and a
    file name that is not valid text is written as its raw bytes. Streams that are not files, as in a notebook, are left
    unchanged.
    """
    for descriptor in (1, 2):
        _open_if_closed(descriptor)
    before = sys.stdout, sys.stderr
    sys.stdout = _unfailing(sys.stdout, errors="ddp_trainer.escape")
    sys.stderr = _unfailing(sys.stderr, errors="backslashreplace")
    now = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in now:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before[0] or now[0], before[1] or now[1]


def output_error() -> OSError | None:
    """The error that silenced stdout in `forgiving_output`. None if there was none, or the reader closed the pipe."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _UnfailingFile) else None
    return None if error is None or error.errno == errno.EPIPE else error


class _UnfailingFile(io.FileIO):
    """An open file descriptor whose writes never raise OSError. After the first error, all output is dropped."""

    error: OSError | None = None  # the first error

    def write(self, data: Any, /) -> int:
        while self.error is None:
            try:
                written = super().write(data)
            except OSError as error:
                self.error = error
            else:
                if written is not None:
                    return written
                self._wait()
        return len(data)

    def _wait(self) -> None:
        """Waits until a full non-blocking pipe can be written to again."""
        poll = select.poll()
        poll.register(self, select.POLLOUT)
        poll.poll()


def unfailing_copy(descriptor: int) -> TextIO:
    """A stream for a copy of `descriptor`. Its writes never raise OSError, and closing it leaves `descriptor` open."""
    return io.TextIOWrapper(io.BufferedWriter(_UnfailingFile(os.dup(descriptor), "w")), errors="backslashreplace")


def _unfailing(stream: TextIO | None, *, errors: str) -> TextIO:
    """A stream with the same file descriptor as `stream`, whose writes never raise OSError.

    If `stream` is closed, the result writes to /dev/null. If `stream` is not a file, it is returned unchanged.
    """
    if stream is None or getattr(stream, "closed", False):
        return open(os.devnull, "w", encoding="utf-8", errors=errors)
    if not isinstance(stream, io.TextIOWrapper) or isinstance(getattr(stream.buffer, "raw", None), _UnfailingFile):
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    try:
        raw = _UnfailingFile(stream.fileno(), "w", closefd=False)
    except (OSError, ValueError):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_if_closed(descriptor: int) -> None:
    """If `descriptor` is closed, opens /dev/null in its place.

    If the descriptor stayed closed, the next file to be opened would get its number, and C code would print into
    that file.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_WRONLY)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("ddp_trainer.escape", _escape)
