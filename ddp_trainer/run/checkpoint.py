"""Training states on disk: written whole, checked before they are trusted, the newest good one found.

Layout: `checkpoints/step-NNNNNNNN/{state.pt, manifest.json}`. A checkpoint is written into a temporary folder beside
its place, flushed to the disk and renamed, so the name exists only when the content does. Everything in it is a tensor
or a plain value and loads with `weights_only=True`. Not owned here: when to save, and saving in the background
(`checkpoint_saver`).
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from data_prep.files import sync_folder

STATE, MANIFEST = "state.pt", "manifest.json"
FORMAT_VERSION = 1
NAME = re.compile(r"step-(\d{8,})")
WRITING, REPLACED, DROPPED = ".writing-", ".replaced-", ".dropped-"


class CheckpointError(Exception):
    """A checkpoint that is damaged or could not be written."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; temporary ones left out."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def write_checkpoint(place: Path, state: dict[str, Any], *, step: int, score: float | None = None) -> None:
    """Writes `place` atomically. An older checkpoint of the same step is moved away only when the new one is complete.

    `score`: how good the model is, where validation images tell.
    """
    temporary = place.with_name(WRITING + place.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with (temporary / STATE).open("wb") as file:
            torch.save(state, file)
            _flush(file)
        facts = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "score": score,
            "bytes": (temporary / STATE).stat().st_size,
        }
        with (temporary / MANIFEST).open("w") as file:
            file.write(_manifest(facts, temporary / STATE))
            _flush(file)
        sync_folder(temporary)
        if place.exists():
            place.rename(place.with_name(REPLACED + place.name))
        temporary.rename(place)
        sync_folder(place.parent)
        shutil.rmtree(place.with_name(REPLACED + place.name), ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clean_up(folder: Path) -> None:
    """Removes what a killed run left half done. Only for the process that holds the run directory."""
    for path in folder.glob(f"{REPLACED}*"):
        place = path.with_name(path.name.removeprefix(REPLACED))
        if not place.exists():  # killed between the two renames
            path.rename(place)
    for prefix in (WRITING, REPLACED, DROPPED):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def drop_old(folder: Path, *, keep: int, step: int) -> None:
    """Of the checkpoints up to that of `step`, keeps the newest `keep` and the one with the highest score.

    Those of later steps are damaged: the run went on from before them.
    """
    found = list_checkpoints(folder)
    good = [path for path in found if step_of(path) <= step]
    kept = {*good[:keep], *_best(good)}
    for path in found:
        if path not in kept:
            doomed = path.with_name(DROPPED + path.name)
            path.rename(doomed)  # gone as a name first: a half-deleted folder is never taken for a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


def _best(found: list[Path]) -> list[Path]:
    """The oldest of those with the highest score; none where nothing was scored."""
    scores: dict[Path, float] = {}
    for path in reversed(found):
        try:
            score = json.loads((path / MANIFEST).read_text())["score"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: it is found out when it is to be loaded
        if isinstance(score, float):
            scores[path] = score
    return [max(scores, key=lambda path: scores[path])] if scores else []


def read_checkpoint(path: Path, required: Collection[str] = ()) -> dict[str, Any]:
    """The state, in host memory.

    Raises CheckpointError, saying why, unless state and manifest are byte for byte what was written, and the state
    loads and has the `required` keys.
    """
    try:
        text = (path / MANIFEST).read_text()
        facts = json.loads(text)
        version, size, step = facts["format_version"], facts["bytes"], facts["step"]
        del facts["sha256"]
        actual = (path / STATE).stat().st_size
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no readable manifest or state ({_name(error)})") from None
    if actual != size:
        raise CheckpointError(f"{path / STATE}: {actual} bytes instead of {size}")
    if (version, step) != (FORMAT_VERSION, step_of(path)) or text != _manifest(facts, path / STATE):
        raise CheckpointError(f"{path}: state and manifest do not match their checksum")
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader has no common type for what it cannot read
        raise CheckpointError(f"{path / STATE}: cannot be loaded ({_name(error)})") from None
    missing = set(required) - set(state) if isinstance(state, dict) else set(required) or {"everything"}
    if missing:
        raise CheckpointError(f"{path / STATE}: lacks {', '.join(sorted(missing))}")
    return state


def newest_good_checkpoint(folder: Path, required: Collection[str] = ()) -> Path | None:
    """The newest checkpoint that passes its checks; each one that does not is named on stderr. None: there is none."""
    for path in list_checkpoints(folder):
        try:
            read_checkpoint(path, required)
        except CheckpointError as error:
            print(f"warning: skipping a damaged checkpoint: {error}", file=sys.stderr, flush=True)
        else:
            return path
    return None


def _manifest(facts: dict[str, Any], state: Path) -> str:
    """The only text that describes these facts and this state. Its sha256 is over both."""
    plain = json.dumps(facts, sort_keys=True)
    with state.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(plain.encode())
    return json.dumps({**facts, "sha256": digest.hexdigest()}, indent=2, sort_keys=True) + "\n"


def _name(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
