"""Saves the training state in the background, one checkpoint at a time. Only the main process uses this module.

`checkpoint` reads and writes the files.
"""

import shutil
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import warn
from data_prep.files import DISK_FULL
from ddp_trainer.engine.host_copy import HostCopy
from ddp_trainer.run.checkpoint import CheckpointError, checkpoint_path, remove_old, write_checkpoint


class CheckpointSaver:
    """Saves checkpoints, and keeps the `keep` newest ones and the one with the highest score."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._copy: HostCopy | None = None  # of the state that is being saved
        self._warned = False

    def save(
        self,
        state: dict[str, Any],
        *,
        step: int,
        score: float | None = None,
        before_saving: Callable[[], object] = lambda: None,
        when_saved: Callable[[], object] = lambda: None,
    ) -> None:
        """Waits for the previous save, copies the state and returns.

        A thread calls `before_saving`, saves the copy, and calls `when_saved`.

        Raises CheckpointError if the previous save failed. If the previous `when_saved` failed, raises its exception.
        """
        self.wait()
        self._copy = HostCopy(state)
        self._pending = self._writer.submit(self._write, step, score, before_saving, when_saved)

    def check(self) -> None:
        """Like `wait`, but does nothing while the last save is still in progress."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self, *, seconds: float | None = None) -> bool:
        """Waits for the last save, but not longer than `seconds`. Returns whether it is on disk.

        Raises the same exceptions as `save`.
        """
        if self._pending is not None:
            if not futures.wait([self._pending], timeout=seconds).done:
                return False
            pending, self._pending = self._pending, None
            try:
                pending.result()
            finally:
                # The writer thread must not free the copy, because page-locked memory must not be freed while a CUDA
                # graph is captured. The thread that calls `wait` also does the captures, so it frees the copy.
                self._copy = None
        return True

    def close(self) -> None:
        """Waits for the last save and ends the writer thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _write(
        self,
        step: int,
        score: float | None,
        before_saving: Callable[[], object],
        when_saved: Callable[[], object],
    ) -> None:
        place = checkpoint_path(self.folder, step)
        assert self._copy is not None
        state = self._copy.read()
        try:
            before_saving()
            write_checkpoint(place, state, step=step, score=score)
        except Exception as error:
            raise CheckpointError(f"cannot save {place}: {self._free_space_note(state, error)}{error}") from error
        when_saved()
        self._remove_old(step)

    def _remove_old(self, step: int) -> None:
        """Removes old checkpoints. A failure is only a warning, because the new checkpoint is saved already."""
        try:
            remove_old(self.folder, keep=self.keep, step=step)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warn(f"old checkpoints in {self.folder} cannot be removed ({error}); the run continues")

    def _free_space_note(self, state: dict[str, Any], error: Exception) -> str:
        """A note on needed and free bytes if the disk may be full; otherwise an empty string.

        The errno of an OSError says whether the disk is full. An exception of any other type may mean a full disk,
        because torch.save raises a RuntimeError when the disk is full.
        """
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            return ""
        try:
            free = f"{shutil.disk_usage(self.folder).free:,}"
        except OSError:
            free = "an unknown number"
        return f"{size_in_bytes(state):,} bytes are needed, {free} are free: "


def size_in_bytes(value: Any) -> int:
    """Size of all tensors in a state. Its other values are small."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(size_in_bytes(item) for item in items)
