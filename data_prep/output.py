"""Checks the output folder of a dataset, makes a temporary folder in it, and writes lists beside it.

The lists name unreadable images or duplicates. Files that data_prep did not write are not replaced or removed.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_prep.errors import InputError, require, require_printable, shell_path
from data_prep.files import DISK_FULL, MAX_JSON_BYTES, open_regular, replace_file
from data_prep.manifest import MANIFEST, SPLITS

BETONS = tuple(f"{split}.beton" for split in SPLITS)
LIST_HEADER = b"# written by python -m data_prep\n"  # the first line of each list, by which it is recognized
WRITING = ".writing-"  # start of the name of a temporary folder
SPOOLED = tuple(f"{split}.{kind}" for split in SPLITS for kind in ("images", "records", "json"))  # see `open_spool`
WRITTEN = {"lock", MANIFEST, *BETONS, *SPOOLED}  # all files that can be in a temporary folder
MANIFEST_START = b'{"format_version":'  # how a manifest starts, without whitespace


def out_folder(text: str) -> Path:
    """The value of --out. Raises InputError if it is empty, because `Path("")` is the current folder."""
    require(bool(text), "--out must not be empty; name a folder, or . for the current folder")
    return Path(text)


def check_out(out: Path) -> None:
    """Raises InputError if `out` is not usable, or if it has files of another origin that the dataset would replace."""
    require_printable("out", out)
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise InputError(f"--out {shell_path(out)}: {shell_path(nearest)} is not a folder; use another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out {shell_path(out)}: {shell_path(nearest)} is not writable; use another folder")
    try:
        blocked = [path for name in (MANIFEST, *BETONS) if (path := out / name).is_dir()]
    except OSError as error:
        raise InputError(f"--out {shell_path(out)}: {error.strerror}; use another folder") from None
    if blocked:
        raise InputError(f"--out {shell_path(out)}: {shell_path(blocked[0])} is a folder; use another folder")
    present = [name for name in (MANIFEST, *BETONS) if os.path.lexists(out / name)]
    require(
        not present or _is_ours(out),
        f"--out {shell_path(out)} contains {', '.join(present)}, but no dataset.json that data_prep wrote; "
        "use another folder, or remove these files (they may be left over from an interrupted data_prep)",
    )


def _is_ours(out: Path) -> bool:
    """Whether data_prep wrote the dataset files in `out`. They may be damaged, and some may be missing."""
    if not os.path.lexists(out / MANIFEST):
        return any(out.glob(f"{WRITING}*/{MANIFEST}"))  # data_prep was killed while it moved its files to `out`
    try:
        with open_regular(out / MANIFEST) as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError:
        return False
    if len(text) > MAX_JSON_BYTES:
        return False  # data_prep's files are smaller: see `read_json`
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # damaged, for example cut off, or filled with zeros by a file system
        start = b"".join(text[:100].replace(b"\0", b"").split())
        return start.startswith(MANIFEST_START) or MANIFEST_START.startswith(start)
    return isinstance(content, dict) and "format_version" in content


def _is_our_list(path: Path) -> bool:
    """Whether a file starts with LIST_HEADER. False if the file is missing or unreadable."""
    try:
        with open_regular(path) as file:
            return file.read(len(LIST_HEADER)) == LIST_HEADER
    except OSError:
        return False


@contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A new folder in `out`, removed at the end. After an error, the parent folders made for it are removed, too.

    A file in it is locked until the end, so that `remove_left_behind` can tell whether the folder is still in use. If
    an error leaves `out` with some of the files of a dataset, but without a manifest, the folder is kept. The manifest
    in it then tells `check_out` that these files are from data_prep.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=WRITING, dir=out))
    except OSError as error:
        raise InputError(f"--out {shell_path(out)} is not writable ({error.strerror}); use another folder") from None
    try:
        with _lock(temporary):
            yield temporary
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL and error.filename is None:
            error.filename = str(out)
        is_partly_moved = any(os.path.lexists(out / name) for name in BETONS) and not os.path.lexists(out / MANIFEST)
        if not (is_partly_moved and (temporary / MANIFEST).exists()):
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # another process may have put something there
            for folder in made:
                folder.rmdir()
        raise
    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def files_locked(out: Path) -> Iterator[None]:
    """Within the block, no other command moves or removes the dataset's files in the folder `out`.

    Has no effect if `out` does not exist or if its file system cannot lock folders.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield


def _lock(folder: Path) -> BinaryIO:
    """Locks `folder` until the returned file is closed.

    Another process may remove the folder in `remove_left_behind` before it is locked. If so, it is made again.
    """
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            lock = open(folder / "lock", "wb")  # noqa: SIM115
            with suppress(OSError):  # not every file system can lock files
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / "lock").exists():
                return lock
            lock.close()


def remove_left_behind(out: Path) -> None:
    """Removes the temporary folders that killed processes left in `out`. Keeps those that are in use on any machine.

    Also keeps links, and folders that contain anything that data_prep does not write.
    """
    for folder in out.glob(f"{WRITING}*"):
        with suppress(OSError), ExitStack() as stack:
            names = os.listdir(folder)
            if folder.is_symlink() or not WRITTEN.issuperset(names):
                continue
            if "lock" in names:  # without it, the folder is not in use, or is so new that it is empty: see `_lock`
                handle = os.open(folder / "lock", os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                stack.callback(os.close, handle)
                # Fails if another process holds the lock, or if the file system cannot lock files.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in names:
                (folder / name).unlink()  # still locked, for a process waiting in `_lock`
            stack.close()  # on NFS, the folder could not be removed while its file `lock` was open
            folder.rmdir()


def remove_lists(out: Path, *names: str) -> None:
    """Removes OUT.NAME.txt for each of `names`, if an earlier data_prep wrote it."""
    for path in (_list_file(out, name) for name in names):
        if _is_our_list(path):
            with suppress(OSError):
                path.unlink()


def _list_file(out: Path, name: str) -> Path:
    return Path(f"{out if out.name not in ('', '..') else os.path.abspath(out)}.{name}.txt")


def write_list(out: Path, name: str, lines: Sequence[str]) -> str:
    """Writes the lines to OUT.NAME.txt, beside the folder `out`.

    Returns text that says where the list is, or why it could not be written.
    """
    path = _list_file(out, name)
    if path.is_file() and not _is_our_list(path):
        return f"not listed, because {shell_path(path)} exists and was not written by data_prep; rename that file"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, LIST_HEADER + "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        return f"not listed, because {shell_path(path)} cannot be written ({error.strerror})"
    return f"all are listed in {shell_path(path)}"
