"""Checkpoints on disk: writes them atomically, checks them before use, and finds the newest good one.

Layout: `checkpoints/step-NNNNNNNN/{state.pt, manifest.json}`. A checkpoint is written into a temporary folder next to
the final one and flushed to the disk. Then the folder is renamed, so a half-written folder never has the final name.
The state consists of tensors and plain values, so it can be loaded with `weights_only=True`. `checkpoint_saver` saves
in the background, and `engine.save_schedule` decides when to save.
"""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import torch

from data_prep.errors import ExplainedError, InputError, warn
from data_prep.files import open_regular, read_text, sync, sync_handle
from data_prep.machine_limits import due_to_machine
from ddp_trainer.run.files import list_checkpoints, step_of

STATE, MANIFEST = "state.pt", "manifest.json"
FORMAT_VERSION = 3
UNREADABLE = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT)  # say nothing about the content of a file
WRITING, REPLACED, DROPPED = ".writing-", ".replaced-", ".dropped-"


class CheckpointError(ExplainedError):
    """A checkpoint is damaged or could not be written."""


class OtherRelease(CheckpointError):
    """A checkpoint is intact, but was written by a release that saved another format or other keys."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def write_checkpoint(place: Path, state: dict[str, Any], *, step: int, score: float | None = None) -> None:
    """Writes a checkpoint into the folder `place`, atomically.

    An older checkpoint of the same step is moved away only when the new one is complete. `score`: accuracy on the
    validation images, if the run has any.
    """
    temporary = place.with_name(WRITING + place.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with (temporary / STATE).open("wb") as file:
            torch.save(state, file)
            _flush(file, temporary / STATE)
        facts = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "score": score,
            "bytes": (temporary / STATE).stat().st_size,
        }
        with (temporary / MANIFEST).open("w") as file:
            file.write(_manifest(facts, temporary / STATE))
            _flush(file, temporary / MANIFEST)
        sync(temporary)
        if place.exists():
            _move_away(place, REPLACED)
        temporary.rename(place)  # `place` is an empty folder if it could not be moved away
        sync(place.parent)
        shutil.rmtree(place.with_name(REPLACED + place.name), ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clean_up(folder: Path) -> None:
    """Removes the temporary folders of a killed run. Restores a checkpoint that the run moved away but did not replace.

    Call it only in the process that has locked the run directory.
    """
    for path in folder.glob(f"{REPLACED}*"):
        place = path.with_name(path.name.removeprefix(REPLACED))
        if not place.exists():  # the run was killed between the two renames of `write_checkpoint`
            with contextlib.suppress(OSError):
                path.rename(place)
    for prefix in (WRITING, REPLACED, DROPPED):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def remove_old(folder: Path, *, keep: int, step: int) -> None:
    """Removes the checkpoints that are not needed any more. Call it after the checkpoint of `step` was saved.

    Of the checkpoints up to `step`, keeps the newest `keep`, the one with the highest score, and those whose score
    cannot be read at the moment. Removes all checkpoints of later steps: the run did not resume from them, because they
    could not be used, and it repeats their steps.

    Raises OSError if a checkpoint cannot be removed, but only after it has tried to remove all others.
    """
    found = list_checkpoints(folder)
    good = [path for path in found if step_of(path) <= step]
    kept = {*good[:keep], *_best(good)}
    failure: OSError | None = None
    for path in found:
        if path not in kept:
            try:
                shutil.rmtree(_move_away(path, DROPPED))
            except OSError as error:
                failure = failure or error
    if failure is not None:
        raise failure


def _move_away(path: Path, prefix: str) -> Path:
    """Renames a checkpoint, so that a half-deleted folder is never mistaken for a checkpoint. Returns the new path.

    Some file systems cannot rename certain folders: overlayfs, for example, cannot rename a folder in a lower layer. In
    that case, deletes the files in the folder and returns `path`. The manifest is deleted first, because a folder
    without a manifest is not a valid checkpoint.
    """
    try:
        return path.rename(path.with_name(prefix + path.name))
    except OSError:
        for name in (MANIFEST, STATE):
            (path / name).unlink(missing_ok=True)
        return path


def _best(found: list[Path]) -> list[Path]:
    """The checkpoint with the highest score (in a tie, the oldest), if any has a score.

    The result also contains all checkpoints whose manifest cannot be read at the moment, because one of them may have
    the highest score.
    """
    scores: dict[Path, float] = {}
    unread: list[Path] = []
    for path in reversed(found):
        try:
            score = json.loads(read_text(path / MANIFEST))["score"]
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            continue  # a damaged checkpoint, which is reported when it is loaded
        except OSError:
            unread.append(path)
            continue
        if isinstance(score, float):
            scores[path] = score
    return [*unread, max(scores, key=lambda path: scores[path])] if scores else unread


def read_checkpoint(path: Path, required: Collection[str] = ()) -> dict[str, Any]:
    """The state of the checkpoint `path`, in host memory.

    Raises CheckpointError if a byte of the state or the manifest has changed, if the folder was renamed, or if the
    state cannot be loaded. Raises OtherRelease if the checkpoint has another format, or lacks some of the `required`
    keys. If memory or file descriptors run out, that error is raised instead, because the checkpoint may be intact.
    For the same reason, raises InputError if the files exist, but cannot be opened.
    """
    try:
        text = read_text(path / MANIFEST)
        facts = json.loads(text)
        version, size, step = facts["format_version"], facts["bytes"], facts["step"]
        del facts["sha256"]
        actual = (path / STATE).stat().st_size
        if actual != size:
            raise CheckpointError(f"{path / STATE} has {actual} bytes instead of {size}")
        expected = _manifest(facts, path / STATE)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if due_to_machine(error):
            raise
        if isinstance(error, OSError) and error.errno in UNREADABLE:
            raise InputError(
                f"{path} cannot be read ({error.strerror}); it may be intact, so make it readable"
            ) from None
        raise CheckpointError(f"{path} has no readable manifest or state ({_name(error)})") from None
    if text != expected:
        raise CheckpointError(f"{path}: state and manifest do not match their checksum")
    if step != step_of(path):
        raise CheckpointError(f"{path} contains the checkpoint of step {step}, so the folder was renamed or copied")
    if version != FORMAT_VERSION:
        raise OtherRelease(f"{path} has format {version}, but this release reads format {FORMAT_VERSION}")
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises many types of exceptions
        if due_to_machine(error):
            raise
        raise CheckpointError(f"{path / STATE} cannot be loaded ({_name(error)})") from None
    if not isinstance(state, dict):
        raise OtherRelease(f"{path} has no keys, which this release needs")
    missing = set(required) - set(state)
    if missing:
        raise OtherRelease(f"{path} has no {', '.join(sorted(missing))}, which this release needs")
    return state


def newest_good_checkpoint(folder: Path, required: Collection[str] = ()) -> Path | None:
    """The newest checkpoint that can be read, or None. Prints a warning for each newer checkpoint that is damaged.

    Raises OtherRelease if the newest intact checkpoint was written by another release.
    """
    for path in list_checkpoints(folder):
        try:
            read_checkpoint(path, required)
        except OtherRelease:
            raise
        except CheckpointError as error:
            warn(f"skipping a damaged checkpoint: {error}")
        else:
            return path
    return None


def _manifest(facts: dict[str, Any], state: Path) -> str:
    """Content of manifest.json: `facts`, and one sha256 for the file `state` and the facts together."""
    plain = json.dumps(facts, sort_keys=True)
    with open_regular(state) as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(plain.encode())
    return json.dumps({**facts, "sha256": digest.hexdigest()}, indent=2, sort_keys=True) + "\n"


def _name(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _flush(file: IO[Any], path: Path) -> None:
    file.flush()
    sync_handle(file.fileno(), path)
