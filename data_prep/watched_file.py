"""A file that must keep its content while a run reads it."""

import hashlib
from pathlib import Path


class DatasetChanged(RuntimeError):
    """The file does not have the content it had at the start of the run."""


class WatchedFile:
    """Notices a change cheaply, by size, time and inode, and compares the content only then."""

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        """`sha256`: of the content, if known. If given, the file may be touched, or replaced by a copy."""
        self.path, self._sha256 = path, sha256
        self._identity = self._read_identity()

    def check(self) -> None:
        """Raises DatasetChanged if the file is gone or has other content."""
        identity = self._read_identity()
        if identity == self._identity:
            return
        if identity is None or self._sha256 is None or self._read_sha256() != self._sha256:
            raise DatasetChanged(
                f"{self.path} was removed, replaced or changed while it was being read; restore it and resume"
            )
        self._identity = identity

    def _read_identity(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read_sha256(self) -> str | None:
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None
