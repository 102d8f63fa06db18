"""Writes beton files with FFCV, in a guarded child process (`ffcv_writer`)."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from select import select

import numpy as np

from data_prep.sources import Split

STALL_SECONDS = 60.0


def write_betons(
    folder: Path, splits: Mapping[str, Split], *, progress: Callable[[str, int], object] = lambda name, written: None
) -> None:
    """Writes each split to `folder`/NAME.beton with FFCV's DatasetWriter; the same input gives the same bytes.

    When FFCV's writer fails, it spins forever. So it runs in a child process that exits at the first exception, is
    killed if it makes no progress, and ends when this process ends. `progress` is called with the name of a split and
    the number of its images written so far. Raises RuntimeError with the writer's last line of output if it fails.
    """
    for split in splits.values():
        check_split(split)
    with tempfile.TemporaryDirectory(prefix=".arrays-", dir=folder) as arrays:
        for name, split in splits.items():
            np.save(Path(arrays) / f"{name}.images.npy", split.images)
            np.save(Path(arrays) / f"{name}.labels.npy", split.labels)
        child = subprocess.Popen(
            [sys.executable, "-m", "data_prep.ffcv_writer", arrays, str(folder), *splits],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        try:
            _follow(child, progress)
        finally:
            child.kill()  # its resource tracker survives and removes the shared memory
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


def check_split(split: Split) -> None:
    """Raises ValueError for arrays that FFCV's writer cannot write."""
    images, labels = split
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"images must be (N, H, W, 3) uint8 with N > 0, got {images.shape} {images.dtype}")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"labels must be ({len(images)},) non-negative integers, got {labels.shape} {labels.dtype}")
