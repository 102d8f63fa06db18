"""FFCV's beton files: written by FFCV in a guarded child process, checked by our own reading of the format.

Fields: `image` (raw RGB), `label`, `index` (the position in the file, so that a reader can prove what it got). The
format has no magic number, its header looks valid from the first byte on, and FFCV's reader crashes on some damaged
files: nothing is handed to FFCV before `check_beton` has passed it.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from select import select

import numpy as np

from data_prep.errors import InputError
from data_prep.sources import Split

# Our own copies of FFCV's types: importing ffcv.types takes seconds.
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
FIELDS = {"image": 2, "label": 1, "index": 1}  # name -> FFCV's number of the type
RAW = 1

STALL_SECONDS = 60.0


def write_betons(
    folder: Path, splits: Mapping[str, Split], *, progress: Callable[[str, int], object] = lambda name, written: None
) -> None:
    """Writes each split to `folder`/NAME.beton through FFCV's DatasetWriter; the same input gives the same bytes.

    The writer spins for ever when it fails, so it works in a child process that ends at its first exception, is ended
    when it makes no progress, and dies with this process. `progress` is called with a name and the number of its images
    written so far. Raises RuntimeError with the writer's last words where it failed.
    """
    for split in splits.values():
        check_split(split)
    with tempfile.TemporaryDirectory(prefix=".arrays-", dir=folder) as arrays:
        for name, split in splits.items():
            np.save(Path(arrays) / f"{name}.images.npy", split.images)
            np.save(Path(arrays) / f"{name}.labels.npy", split.labels)
        child = subprocess.Popen(
            [sys.executable, "-m", "data_prep.beton_writer", arrays, str(folder), *splits],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        try:
            _follow(child, progress)
        finally:
            child.kill()  # its resource tracker survives it and removes its shared memory
            child.wait()
            for stream in (child.stdout, child.stderr):
                if stream is not None:
                    stream.close()


def _follow(child: subprocess.Popen[str], progress: Callable[[str, int], object]) -> None:
    """Until the child has ended well. Raises RuntimeError where it failed or stalled."""
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
        raise RuntimeError(f"FFCV's writer made no progress for {STALL_SECONDS:.0f} s and was ended")
    if child.wait(timeout=STALL_SECONDS):
        words = child.stderr.read().strip().splitlines()
        raise RuntimeError(f"FFCV's writer failed: {words[-1] if words else f'exit code {child.returncode}'}")


def check_split(split: Split) -> None:
    """Raises ValueError for what FFCV's writer would choke on."""
    images, labels = split
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"images must be (N, H, W, 3) uint8 with N > 0, not {images.shape} {images.dtype}")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"labels must be ({len(images)},) integers from 0, not {labels.shape} {labels.dtype}")


def check_beton(path: Path, *, count: int, image_size: int, num_classes: int) -> None:
    """Raises InputError unless `path` is a whole beton file of ours with these numbers. Milliseconds; no ffcv."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise InputError(_mend(path, "is missing")) from None
    except (OSError, ValueError) as error:
        raise InputError(_mend(path, f"cannot be read ({error})")) from None
    problem = _find_problem(content, count=count, image_size=image_size, num_classes=num_classes)
    if problem:
        raise InputError(_mend(path, problem))


def _mend(path: Path, problem: str) -> str:
    return f"{path} {problem}; write the data anew"


def _find_problem(content: np.ndarray, *, count: int, image_size: int, num_classes: int) -> str | None:
    """What is wrong with the bytes of a beton file, or None."""
    start = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
    if len(content) < start:
        return "is truncated, or no beton file"
    header = content[: HEADER.itemsize].view(HEADER)[0]
    fields = content[HEADER.itemsize : start].view(FIELD)
    names = [bytes(name).rstrip(b"\0").decode("ascii", "replace") for name in fields["name"]]
    if (header["version"], header["num_fields"]) != (2, len(FIELDS)):
        return "is no beton file of this project"
    if dict(zip(names, fields["type_id"].tolist(), strict=True)) != FIELDS:
        return "is no beton file of this project"
    if header["num_samples"] != count:
        return f"holds {header['num_samples']} images instead of {count}"
    table, end = int(header["table"]), start + count * SAMPLE.itemsize
    if not end <= table or len(content) - table != count * ALLOCATION.itemsize:
        return "is incomplete: its writing was interrupted, or it is truncated"
    samples = content[start:end].view(SAMPLE)
    allocations = content[table:].view(ALLOCATION)
    return _find_bad_sample(samples, allocations, end, table, image_size, num_classes)


def _find_bad_sample(
    samples: np.ndarray, allocations: np.ndarray, start: int, end: int, image_size: int, num_classes: int
) -> str | None:
    image, size = samples["image"], image_size * image_size * 3
    if not np.all((image["mode"] == RAW) & (image["width"] == image_size) & (image["height"] == image_size)):
        return f"holds images that are not raw {image_size}x{image_size}"
    if not np.all((image["ptr"] >= start) & (image["ptr"] <= end - size)):
        return "holds image addresses outside the file"
    if not np.array_equal(allocations["ptr"], image["ptr"]) or not np.all(allocations["size"] == size):
        return "holds an allocation table that does not fit its images"
    if not np.all((samples["label"] >= 0) & (samples["label"] < num_classes)):
        return f"holds labels outside 0 to {num_classes - 1}"
    if not np.array_equal(samples["index"], np.arange(len(samples))):
        return "holds images out of order"
    return None


def read_labels(path: Path) -> np.ndarray:
    """(N,) int64 labels of a checked file, without ffcv."""
    count = int(np.fromfile(path, dtype=HEADER, count=1)["num_samples"][0])
    offset = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
    return np.fromfile(path, dtype=SAMPLE, count=count, offset=offset)["label"].astype(np.int64)
