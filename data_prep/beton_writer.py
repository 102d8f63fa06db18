"""Writes beton files, FFCV's format, in a child process (`ffcv_writer`), which is killed if it stalls."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from select import select

from data_prep.errors import printable
from data_prep.machine_limits import lacks_memory

START_SECONDS, STALL_SECONDS = 300.0, 60.0  # the start includes imports, perhaps from a slow network file system


def write_betons(
    folder: Path, names: Sequence[str], *, progress: Callable[[str, int], object] = lambda name, written: None
) -> None:
    """Writes `folder`/NAME.beton for each split in `names`, from the temporary files of the module `spool`.

    The same input gives the same bytes. When FFCV's writer fails, it waits forever. It therefore runs in a child
    process that exits at the first exception, is killed if it stalls before the last image, and ends with this process.
    `progress` is called with the name of a split and the number of its images written so far. Raises MemoryError if the
    machine lacks memory, OSError for errors of the system, such as a full disk, and ChildProcessError for other errors.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "data_prep.ffcv_writer", str(folder), *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # with a buffer, `select` would not see lines that were read together with an earlier one
    )
    try:
        _follow(child, progress)
    finally:
        child.kill()
        child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def _follow(child: subprocess.Popen[bytes], progress: Callable[[str, int], object]) -> None:
    """Reports progress until the child has finished. Raises an exception if it fails or stalls."""
    assert child.stdout is not None and child.stderr is not None
    patience: float | None = START_SECONDS
    while select([child.stdout], [], [], patience)[0]:
        line = child.stdout.readline().decode(errors="replace")
        if not line:
            break
        if line.startswith("!"):
            raise _failure(line[1:].strip())
        written, total, name = line.split(maxsplit=2)
        # After the last image, the writer closes the file. On a network file system, this may take minutes.
        patience = None if written == total else STALL_SECONDS
        progress(name.strip(), int(written))
    else:
        raise ChildProcessError(f"FFCV's writer made no progress for {patience:.0f} s and was killed")
    if child.wait():
        lines = child.stderr.read().decode(errors="replace").strip().splitlines()
        raise _failure(lines[-1] if lines else f"exit status {child.returncode}")


def _failure(line: str) -> Exception:
    """The exception for the writer's last line of output."""
    error = ChildProcessError(f"FFCV's writer failed: {printable(line)}")
    if lacks_memory(error):
        return MemoryError(*error.args)
    if found := re.search(r"\[Errno (\d+)\]", line):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return error
