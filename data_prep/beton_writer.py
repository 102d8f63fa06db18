"""Writes beton files with FFCV in a child process (`ffcv_writer`), which is killed if it stalls."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from select import select

STALL_SECONDS = 60.0


def write_betons(
    folder: Path, names: Sequence[str], *, progress: Callable[[str, int], object] = lambda name, written: None
) -> None:
    """Writes the splits `names`, spooled in `folder`, to `folder`/NAME.beton. The same input gives the same bytes.

    When FFCV's writer fails, it waits forever. It therefore runs in a child process that exits at the first exception,
    is killed if it makes no progress, and ends when this process ends. `progress` is called with the name of a split
    and the number of its images written so far. Raises RuntimeError if the writer fails or stalls.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "data_prep.ffcv_writer", str(folder), *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    try:
        _follow(child, progress)
    finally:
        child.kill()  # Python's resource tracker survives and removes the child's shared memory
        child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def _follow(child: subprocess.Popen[str], progress: Callable[[str, int], object]) -> None:
    """Reports progress until the child has finished. Raises RuntimeError if it fails or stalls."""
    assert child.stdout is not None and child.stderr is not None
    while select([child.stdout], [], [], STALL_SECONDS)[0]:
        line = child.stdout.readline()
        if not line:
            break
        if line.startswith("!"):
            raise RuntimeError(f"FFCV's writer failed: {line[1:].strip()}")
        written, name = line.split(maxsplit=1)
        progress(name.strip(), int(written))
    else:
        raise RuntimeError(f"FFCV's writer made no progress for {STALL_SECONDS:.0f} s and was killed")
    if child.wait(timeout=STALL_SECONDS):
        lines = child.stderr.read().strip().splitlines()
        raise RuntimeError(f"FFCV's writer failed: {lines[-1] if lines else f'exit status {child.returncode}'}")
