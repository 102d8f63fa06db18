"""Locks a folder for one run, and notices when srun has started several copies of this program."""

import contextlib
import fcntl
import os
import sys
from pathlib import Path
from typing import IO

from data_prep.errors import InputError
from data_prep.files import DISK_FULL
from ddp_trainer.distributed.launch import Launch

LOCK = ".lock"
LOCK_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC  # NFS requires O_RDWR for an exclusive lock


def lock_folder(path: Path) -> IO[bytes]:
    """Creates the folder and locks it until the returned file is closed.

    Raises InputError if the folder cannot be written or another run has locked it, and OSError if the disk is full. If
    the file system cannot lock files, prints a warning and returns the file unlocked.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(os.open(path / LOCK, LOCK_FLAGS | os.O_CREAT, 0o666), "rb")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"--out {path} cannot be written ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # PermissionError is what SMB reports
        lock.close()
        fix = srun_mistake() or "choose another folder, or wait until that run has ended"
        raise InputError(f"--out {path}: another run is using this folder; {fix}") from None
    except OSError as error:
        warning = f"warning: {path} cannot be locked ({error.strerror}); make sure that no other run uses this folder"
        print(warning, file=sys.stderr, flush=True)
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
