"""Recognizes errors that the machine causes, not the input: too little memory or disk space, or a missing library."""

import errno
import resource
import shutil
from pathlib import Path

from data_prep.errors import InputError, printable, shell_path
from data_prep.files import DISK_FULL

RESOURCE_ERRORS = {*DISK_FULL, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
NO_MEMORY = (  # what libraries say if they do not raise MemoryError
    "memoryerror",
    "out of memory",
    "unable to allocate",
    "cannot allocate memory",
    "can't start new thread",
    "bad_alloc",
)


def due_to_machine(error: BaseException) -> bool:
    """Whether memory, disk space or file descriptors ran out, or a library cannot be loaded."""
    return (
        lacks_memory(error)
        or isinstance(error, ImportError)
        or (isinstance(error, OSError) and error.errno in RESOURCE_ERRORS)
    )


def lacks_memory(error: BaseException) -> bool:
    text = str(error).lower()
    # "Failed to map segment" means that memory ran out, or that a library is on a file system mounted with noexec.
    # Without a memory limit, the second is more likely.
    unmapped = "failed to map segment" in text and _memory_limit() is not None
    return isinstance(error, MemoryError) or unmapped or any(words in text for words in NO_MEMORY)


def _memory_limit() -> int | None:
    """The memory limit of this shell (ulimit -v), in bytes. None: no limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def machine_problem(error: BaseException) -> str | None:
    """One line that explains an error of the machine or the operating system, or None for any other error."""
    if lacks_memory(error):
        if (limit := _memory_limit()) is None:
            return "there is not enough free memory; close other programs, or prepare fewer or smaller images"
        return f"the memory limit of this shell, {limit / 1e6:,.0f} MB, is too low; raise it with ulimit -v"
    if isinstance(error, ImportError):
        return f"a library cannot be loaded: {printable(str(error))}"
    return printable(str(error)) if isinstance(error, OSError) else None


def require_space(out: Path, needed: int) -> None:
    """Raises InputError if fewer than `needed` bytes are free on the disk of `out`."""
    existing = next((folder for folder in (out, *out.absolute().parents) if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"--out {shell_path(out)} needs {needed / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are free; "
            "free some space, or choose another folder"
        )
