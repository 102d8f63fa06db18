"""Saves training states while training goes on, one at a time. For the main process; the files are `checkpoint`'s."""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ddp_trainer.run.checkpoint import CheckpointError, checkpoint_path, clean_up, drop_old, write_checkpoint


class HostCopy:
    """A deep copy of a state, in host memory: what training changes afterwards does not reach it.

    Copies from a GPU are put in its queue and not waited for: they are made before the kernels of the next step run.
    `wait` for them before the copy is read.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._on_gpu = False
        self._state = self._copy(state)
        self._event = torch.cuda.Event() if self._on_gpu else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> dict[str, Any]:
        if self._event is not None:
            self._event.synchronize()
        return self._state

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self._on_gpu |= value.is_cuda
            copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return copy.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._copy(item) for item in value]
        return value


class CheckpointSaver:
    """Keeps the newest `keep` checkpoints, and the one with the highest score. Takes over what a killed run left."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        clean_up(folder)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: dict[str, Any], *, step: int, score: float | None = None) -> None:
        """Copies the state and returns; the disk is written while training goes on.

        Raises CheckpointError where the save before this one failed.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, HostCopy(state), step, score)

    def check(self) -> None:
        """Raises CheckpointError where the last save has failed already. Waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the last save is on the disk. Raises CheckpointError where it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits for the last save and ends the writer."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _write(self, copy: HostCopy, step: int, score: float | None) -> None:
        place = checkpoint_path(self.folder, step)
        state = copy.wait()
        try:
            write_checkpoint(place, state, step=step, score=score)
            drop_old(self.folder, keep=self.keep, step=step)
        except Exception as error:  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(f"cannot save {place}: {self._room(state)}: {error}") from error

    def _room(self, state: dict[str, Any]) -> str:
        try:
            free = f"{shutil.disk_usage(self.folder).free:,}"
        except OSError:
            free = "an unknown number"
        return f"{size_in_bytes(state):,} bytes are needed, {free} are free"


def size_in_bytes(value: Any) -> int:
    """Of all tensors in a state; what surrounds them in the file is small beside it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(size_in_bytes(item) for item in items)
