"""Creates and locks the folder of a run, and notices when srun has started several copies of this program."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from data_prep.errors import InputError, warn
from data_prep.files import DISK_FULL
from ddp_trainer.distributed.launch import Launch

LOCK = ".lock"
LOCKED = (errno.EWOULDBLOCK, errno.EACCES)  # another process has locked the file; EACCES is what SMB reports
LOCK_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC  # NFS requires O_RDWR for an exclusive lock


@contextlib.contextmanager
def locked_folder(out: Path | None, name: str) -> Iterator[Path]:
    """Yields `out`, or a new folder runs/NAME-TIMESTAMP, and locks it within the block. See `lock_folder`.

    If the folder is new and the block writes nothing into it, it is removed.
    """
    is_new = out is None or not os.path.lexists(out)
    path = out or new_folder(name)
    with lock_folder(path):
        try:
            yield path
        finally:
            if is_new:
                remove_unused(path)


def remove_unused(path: Path) -> None:
    """Removes the folder of a run that has written nothing."""
    with contextlib.suppress(OSError):
        if set(os.listdir(path)) <= {LOCK}:
            shutil.rmtree(path)


def new_folder(name: str) -> Path:
    """Creates runs/NAME-TIMESTAMP and returns its path. If the folder exists already, adds a number to the name.

    Raises InputError if the folder cannot be created, or if srun started several copies of this program. Without this
    check, each copy would train alone, in a folder of its own.
    """
    if mistake := srun_mistake():
        raise InputError(f"{mistake}, or give each copy its own folder with --out")
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    path = Path("runs") / f"{name}-{stamp}"
    try:
        path.parent.mkdir(exist_ok=True)  # raises FileExistsError if `runs` is a link that leads nowhere
        for number in itertools.count(1):
            numbered = path.with_name(f"{path.name}-{number}") if number > 1 else path
            with contextlib.suppress(FileExistsError):
                numbered.mkdir()
                return numbered
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"{path} cannot be created ({error.strerror}); name a folder with --out") from None
    raise AssertionError("itertools.count is endless")


def lock_folder(path: Path) -> IO[bytes]:
    """Creates the folder and locks it until the returned file is closed.

    Raises InputError if the folder cannot be written or another run has locked it, and OSError if the disk is full. If
    the file system cannot lock files, prints a warning and returns the file unlocked.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(os.open(path / LOCK, LOCK_FLAGS | os.O_CREAT, 0o666), "rb")
        if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
            lock.close()
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"--out {path} cannot be written ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in LOCKED:
            lock.close()
            fix = srun_mistake() or "choose another folder, or wait until that run has ended"
            raise InputError(f"--out {path}: another run is using this folder; {fix}") from None
        warn(f"{path} cannot be locked ({error.strerror}); make sure that no other run uses this folder")
    return lock


def wait_until_unlocked(path: Path) -> None:
    """Waits while another process has locked the folder. Returns at once if it does not exist or cannot be locked."""
    with contextlib.suppress(OSError), open(os.open(path / LOCK, LOCK_FLAGS), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def srun_mistake() -> str | None:
    """Returns an error message if srun started several copies of this program, each of which would train alone.

    Otherwise returns None, for example if srun started a shell, and the shell started this program.
    """
    copies = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    in_shell = os.isatty(0) and os.getpgrp() != os.getsid(0)
    if copies == "1" or Launch.from_environment().world_size > 1 or in_shell:
        return None
    return f"srun started {copies} copies of this program instead of one launcher per node; use slurm/train.sh"
