"""Detects that a file changes while a run reads it."""

from pathlib import Path

from data_prep.errors import ExplainedError
from data_prep.files import file_sha256


class DatasetChanged(ExplainedError):
    """A file no longer has the content that it had at the start of the run."""


class DamagedImage(DatasetChanged):
    """An image in a beton file (FFCV's format) is damaged."""

    def __init__(self, beton: Path, position: int, problem: str) -> None:
        super().__init__(
            f"{beton}: image {position} is damaged ({problem}); restore the file or prepare the data again"
        )


class WatchedFile:
    """A file that must not change. Its content is read again only if its size, modification time or inode changes."""

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        """`sha256`: hash of the content. With it, a file that only has a new timestamp or inode counts as unchanged."""
        self.path, self._sha256 = path, sha256
        self._identity = self._read_identity()

    def check(self) -> None:
        """Raises DatasetChanged if the file is gone or its content has changed."""
        identity = self._read_identity()
        if identity == self._identity:
            return
        if identity is None or self._sha256 is None or self._read_sha256() != self._sha256:
            raise DatasetChanged(f"{self.path} was removed, replaced or changed while it was being read; restore it")
        self._identity = identity

    def _read_identity(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read_sha256(self) -> str | None:
        try:
            return file_sha256(self.path)
        except OSError:
            return None
