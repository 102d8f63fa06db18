"""Training states on disk: written whole, checked by sha256 before they are trusted, the newest good one found.

Layout: `checkpoints/step-NNNNNNNN/{state.pt, manifest.json}`. A checkpoint is written into a temporary folder beside
its place, flushed to the disk and renamed, so the name exists only when the content does. Everything in it is a tensor
or a plain value and loads with `weights_only=True`.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

STATE, MANIFEST = "state.pt", "manifest.json"
NAME = re.compile(r"step-(\d{8})")


class CheckpointError(Exception):
    """A checkpoint that is damaged or could not be written."""


def copy_to_host(value: Any) -> Any:
    """A deep copy with every tensor in host memory, so that training may go on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_to_host(item) for item in value]
    return value


class Checkpointer:
    """Saves in the background, one save at a time; keeps the newest `keep` checkpoints. For the main process."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: dict[str, Any], *, step: int) -> None:
        """Copies the state and returns; the disk is written while training goes on.

        Raises CheckpointError where the save before this one failed.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, copy_to_host(state), step)

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

    def _write(self, state: dict[str, Any], step: int) -> None:
        place = self.folder / f"step-{step:08d}"
        try:
            write_checkpoint(place, state, step)
            self._drop_old()
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(f"cannot save {place}: {error}") from error

    def _drop_old(self) -> None:
        for path in list_checkpoints(self.folder)[self.keep :]:
            doomed = path.with_name(f".old-{path.name}")
            path.rename(doomed)  # gone as a name first: a half-deleted folder is never taken for a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


def write_checkpoint(place: Path, state: dict[str, Any], step: int) -> None:
    """Writes `place` atomically, replacing an older checkpoint of the same step."""
    temporary = place.with_name(f".tmp-{place.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with (temporary / STATE).open("wb") as file:
            torch.save(state, file)
            _flush(file)
        manifest = {"format_version": 1, "step": step, "bytes": (temporary / STATE).stat().st_size,
                    "sha256": _sha256(temporary / STATE)}  # fmt: skip
        with (temporary / MANIFEST).open("w") as file:
            json.dump(manifest, file)
            _flush(file)
        _flush_folder(temporary)
        if place.exists():
            shutil.rmtree(place)
        temporary.rename(place)
        _flush_folder(place.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; temporary ones left out."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)


def verify_checkpoint(path: Path) -> None:
    """Raises CheckpointError, saying why, unless size and sha256 of the state are those in the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        size, digest = manifest["bytes"], manifest["sha256"]
        actual = (path / STATE).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable manifest or state ({error})") from None
    if actual != size:
        raise CheckpointError(f"{path / STATE}: {actual} bytes instead of {size}")
    if _sha256(path / STATE) != digest:
        raise CheckpointError(f"{path / STATE}: its content does not match its checksum")


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that passes its checks; each one that does not is named on stderr. None: there is none."""
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            print(f"warning: skipping a damaged checkpoint: {error}", file=sys.stderr, flush=True)
        else:
            return path
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state, in host memory."""
    return torch.load(path / STATE, map_location="cpu", weights_only=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
