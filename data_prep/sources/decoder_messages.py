"""Collects the messages of image decoders, to report them in one line instead of several for each file.

Decoders written in Python issue warnings. C libraries such as libtiff print to stderr.
"""

import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from data_prep.errors import printable, shell_path
from data_prep.sources import MAX_NAMED, count_of

_reading = threading.local()  # .path: the file that this thread reads; .warned: whether a decoder has warned about it


@dataclass
class DecoderMessages:
    """What decoders said about the images: how many files have warnings, how many lines were printed, and examples."""

    num_files: int = 0
    first: list[str] = field(default_factory=list)
    num_printed: int = 0
    first_printed: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, path: Path, message: str) -> None:
        with self._lock:
            self.num_files += 1
            if len(self.first) < MAX_NAMED:
                self.first.append(f"{shell_path(path)} ({printable(' '.join(message.split()))})")

    def note(self) -> str | None:
        """One line about all messages, or None if there were none."""
        parts = []
        if self.num_files:
            more = f" and {self.num_files - len(self.first)} more" if self.num_files > len(self.first) else ""
            files = count_of(self.num_files, "image file")
            parts.append(f"decoders warned about {files}: {', '.join(self.first)}{more}")
        if self.num_printed:
            lines = count_of(self.num_printed, "line")
            parts.append(f"decoders printed {lines} about damaged data: {printable(self.first_printed)}")
        return "; ".join(parts) or None


@contextmanager
def collected_messages(messages: DecoderMessages) -> Iterator[None]:
    """Within the block, redirects stderr, and adds the messages of decoders in all threads to `messages`."""

    def on_warning(message: Warning | str, *_: object, **__: object) -> None:
        path = getattr(_reading, "path", None)
        if path is not None and not _reading.warned:
            _reading.warned = True
            messages.add(path, str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)  # the class of Pillow's warnings about files
        warnings.showwarning = on_warning
        with _collected_lines(messages):
            yield


@contextmanager
def _collected_lines(messages: DecoderMessages) -> Iterator[None]:
    """Within the block, redirects stderr to a temporary file. If no file can be created, stderr is left unchanged."""
    try:
        printed = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError:  # for example, all disks are read-only or full
        yield
        return
    with printed:
        with _stderr_to(printed):
            yield
        printed.seek(0)
        for line in printed:
            messages.num_printed += 1
            messages.first_printed = messages.first_printed or line.decode(errors="replace").strip()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block, records warnings of this thread as warnings about the file `path`."""
    _reading.path, _reading.warned = path, False
    try:
        yield
    finally:
        _reading.path = None


@contextmanager
def _stderr_to(file: IO[bytes]) -> Iterator[None]:
    """Redirects file descriptor 2 (stderr) to `file`."""
    sys.stderr.flush()
    own = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(own, 2)
        os.close(own)
