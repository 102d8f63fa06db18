"""Reads image files from folders named after their classes into memory, in a fixed shuffled order.

Not owned here: which files those are (`listing`), and how one of them becomes pixels (`picture`).
"""

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.errors import InputError, printable, shell_path
from data_prep.sources import ImageSet, Split
from data_prep.sources.listing import Listing, count_of, list_splits, name_some
from data_prep.sources.picture import read_picture, why_unreadable

MIN_SIZE, MAX_SIZE = 8, 1024
CHUNK = 64  # images a thread reads at a time
DARK = 65536 // 8  # 16-bit images whose values all stay below this are likely to have fewer bits

Progress = Callable[[int, int], object]  # images read so far, total


class UnreadableImagesError(InputError):
    """Some image files cannot be read; `problems` has a line for each of them."""

    def __init__(self, problems: Sequence[str], hint: str) -> None:
        super().__init__(f"{count_of(len(problems), 'image file')} cannot be read: {name_some(problems)}; {hint}")
        self.problems = list(problems)


@dataclass
class _Findings:
    """What was found while the files were read, besides their pixels."""

    unreadable: dict[int, str] = field(default_factory=dict)  # position -> file and reason
    metadata_ignored: int = 0
    brightest: int | None = None  # of all 16-bit images
    lock: threading.Lock = field(default_factory=threading.Lock)


def load_folder(
    root: Path,
    *,
    size: int = 32,
    skip_unreadable: bool = False,
    progress: Progress = lambda done, total: None,
) -> ImageSet:
    """All images below `root` as `size` x `size` pixels, in an order that depends on the file names alone.

    Sorted by class and file name, then shuffled with a fixed seed, so that any prefix mixes the classes. Raises
    InputError for a layout without classes, an empty class, classes that differ between train and test, and, unless
    `skip_unreadable`, for images that cannot be read. `notes` of the result say what else was found.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(f"--size must be {MIN_SIZE} to {MAX_SIZE}, got {size}")
    train, test, notes = list_splits(root)
    files = _mixed(train) + _mixed(test)
    _check_memory(len(files), size)
    images, findings = _read_all([path for path, _ in files], size, progress)
    problems = [findings.unreadable[position] for position in sorted(findings.unreadable)]
    if problems and not skip_unreadable:
        raise UnreadableImagesError(problems, "replace or remove them, or add --skip-unreadable")
    labels = np.array([label for _, label in files], dtype=np.int64)
    parts = _split(images, labels, findings.unreadable, len(train.images))
    for listing, part in zip((train, test), parts, strict=True):
        _check_classes(listing, part)
    notes += [line for listing in (train, test) if (line := listing.note())]
    notes += _reading_notes(findings, len(problems)) + _duplicate_notes(*parts)
    return ImageSet(
        source="folder",
        classes=tuple(train.classes),
        train=parts[0],
        test=parts[1],
        notes=tuple(notes),
        skipped=tuple(printable(str(files[position][0].relative_to(root))) for position in sorted(findings.unreadable)),
    )


def _mixed(listing: Listing) -> list[tuple[Path, int]]:
    """The files in the order they are written. They are read in this order too, so no copy has to be shuffled."""
    order = np.random.default_rng(0).permutation(len(listing.images))
    return [listing.images[position] for position in order]


def _check_memory(count: int, size: int) -> None:
    needed = count * size * size * 3
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if needed > available:
        raise InputError(
            f"{count} images of {size}x{size} pixels need {needed / 1e9:,.1f} GB of memory and {available / 1e9:,.1f} "
            "GB are available; use a smaller --size or fewer images"
        )


def _read_all(paths: Sequence[Path], size: int, progress: Progress) -> tuple[np.ndarray, _Findings]:
    """(N, size, size, 3) uint8, and the findings. Pillow decodes outside Python's lock, so threads are enough."""
    images = np.zeros((len(paths), size, size, 3), dtype=np.uint8)
    findings = _Findings()

    def read(start: int) -> None:
        for position in range(start, min(start + CHUNK, len(paths))):
            _read_one(paths[position], images[position], position, findings)

    pool = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn about harmless oddities
            starts = range(0, len(paths), CHUNK)
            for start, _ in zip(starts, pool.map(read, starts), strict=True):
                progress(min(start + CHUNK, len(paths)), len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # after an interruption, no more reads are started
    return images, findings


def _read_one(path: Path, target: np.ndarray, position: int, findings: _Findings) -> None:
    try:
        picture = read_picture(path, len(target))
    except MemoryError:
        raise  # the machine lacks memory; the file may be fine
    except Exception as error:  # decoders raise nearly anything for damaged files
        with findings.lock:
            findings.unreadable[position] = f"{shell_path(path)} ({why_unreadable(error)})"
        return
    target[:] = picture.pixels
    with findings.lock:
        findings.metadata_ignored += picture.metadata_ignored
        if picture.brightest is not None:
            findings.brightest = max(findings.brightest or 0, picture.brightest)


def _split(images: np.ndarray, labels: np.ndarray, unreadable: dict[int, str], num_train: int) -> tuple[Split, Split]:
    """Train and test without the unreadable images. The others move up in place: a copy would double the memory."""
    if not unreadable:
        return Split(images[:num_train], labels[:num_train]), Split(images[num_train:], labels[num_train:])
    kept = np.setdiff1d(np.arange(len(labels)), np.fromiter(unreadable, dtype=np.int64))
    for target, source in enumerate(kept):
        images[target] = images[source]
    num_train = int((kept < num_train).sum())
    images, labels = images[: len(kept)], labels[kept]
    return Split(images[:num_train], labels[:num_train]), Split(images[num_train:], labels[num_train:])


def _check_classes(listing: Listing, split: Split) -> None:
    present = set(split.labels.tolist())
    empty = [shell_path(folder) for label, folder in enumerate(listing.classes.values()) if label not in present]
    if empty:
        raise InputError(f"{name_some(empty)}: no image in it can be read; replace them, or remove the class")


def _reading_notes(findings: _Findings, num_skipped: int) -> list[str]:
    notes = []
    if num_skipped:
        notes.append(f"skipped {count_of(num_skipped, 'unreadable image file')}; dataset.json lists them")
    if findings.metadata_ignored:
        notes.append(f"ignored unreadable metadata of {count_of(findings.metadata_ignored, 'image file')}")
    if findings.brightest is not None and findings.brightest < DARK:
        notes.append(
            f"the 16-bit images are dark: no value exceeds {findings.brightest} of 65535; "
            "if they have fewer bits, scale them to 16 first"
        )
    return notes


def _duplicate_notes(train: Split, test: Split) -> list[str]:
    """Lines about images that occur in both splits, or in two classes; compared as they are written."""
    seen: list[dict[bytes, set[int]]] = []
    for split in (train, test):
        classes: dict[bytes, set[int]] = {}
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            classes.setdefault(digest, set()).add(label)
        seen.append(classes)
    notes = []
    if in_both := len(seen[0].keys() & seen[1].keys()):
        notes.append(
            f"warning: {count_of(in_both, 'image')} in both train and test; the test accuracy will be too high"
        )
    ambiguous = {digest for classes in seen for digest, labels in classes.items() if len(labels) > 1}
    if ambiguous:
        notes.append(f"warning: {count_of(len(ambiguous), 'image')} in more than one class")
    return notes
