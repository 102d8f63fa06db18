"""Checks the output folder of a dataset before any image is read, and writes lists of files beside this folder."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import InputError, require_printable, shell_path
from data_prep.files import replace_file
from data_prep.manifest import MANIFEST, SPLITS
from data_prep.sources.listing import TEST_NAMES, TRAIN_NAMES


def check_out(out: Path) -> None:
    """Raises InputError if `out` is not usable."""
    require_printable("out", out)
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise InputError(f"--out {shell_path(out)}: {shell_path(nearest)} is not a folder; use another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out {shell_path(out)}: {shell_path(nearest)} is not writable; use another folder")
    try:
        blocked = [
            path for name in (MANIFEST, *(f"{split}.beton" for split in SPLITS)) if (path := out / name).is_dir()
        ]
    except OSError as error:
        raise InputError(f"--out {shell_path(out)}: {error.strerror}; use another folder") from None
    if blocked:
        raise InputError(f"--out {shell_path(out)}: {shell_path(blocked[0])} is a folder; use another folder")


def check_outside_splits(out: Path, root: Path) -> None:
    """Raises InputError if the dataset would be written among the images, where it would look like a class."""
    out, root = out.resolve(), root.resolve()
    if root in out.parents and out.relative_to(root).parts[0].lower() in (*TRAIN_NAMES, *TEST_NAMES):
        raise InputError(f"--out {shell_path(out)} is among the images of --root; use another folder")


def remove_list(out: Path, name: str) -> None:
    """Removes OUT.NAME.txt, which describes an older dataset in `out`."""
    with contextlib.suppress(OSError):
        _list_file(out, name).unlink()


def _list_file(out: Path, name: str) -> Path:
    return Path(f"{out if out.name not in ('', '..') else os.path.abspath(out)}.{name}.txt")


def write_list(out: Path, name: str, lines: Sequence[str]) -> str:
    """Writes the lines to OUT.NAME.txt, beside the folder `out`.

    Returns text that says where the list is, or why it could not be written.
    """
    path = _list_file(out, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        return f"not listed, because {shell_path(path)} cannot be written ({error.strerror})"
    return f"all are listed in {shell_path(path)}"
