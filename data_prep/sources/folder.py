"""Reads image files from folders named after their classes, in a fixed shuffled order and with bounded memory.

The module `listing` lists the files to read, and the module `picture` turns a file into pixels.
"""

from array import array
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np

from data_prep.errors import InputError, printable, shell_path
from data_prep.machine_limits import due_to_machine
from data_prep.parallel import map_in_order, num_threads
from data_prep.sources import Findings, Split, UnreadableImagesError, count_of, images_per_chunk, name_some
from data_prep.sources.duplicates import duplicate_files, duplicate_notes, fingerprint
from data_prep.sources.listing import Listing, list_splits
from data_prep.sources.picture import Picture, read_picture, require_valid_limit, why_unreadable

MIN_SIZE, MAX_SIZE = 8, 1024
DARK = 65536 // 8  # if all 16-bit values are below this, the files probably hold data of fewer than 14 bits

Labeled = tuple[Path, int]  # an image file and its label


class _Read(NamedTuple):
    """The pixels and the fingerprint of one image file."""

    picture: Picture
    fingerprint: int


@dataclass
class _Reading:
    """What was found, apart from the pixels, while the files of one split were read."""

    listing: Listing
    unreadable: list[tuple[Path, str]] = field(default_factory=list)  # files and reasons
    seen: array = field(default_factory=lambda: array("Q"))  # fingerprint and label of each image, alternately
    metadata_ignored: int = 0
    brightest: int = -1  # largest value in all 16-bit images; -1 if there are none

    def add(self, read: _Read, label: int) -> None:
        self.seen.extend((read.fingerprint, label))
        self.metadata_ignored += read.picture.metadata_ignored
        self.brightest = max(self.brightest, read.picture.brightest)

    def table(self) -> np.ndarray:
        """(N, 2) uint64: fingerprint and label of each image."""
        return np.array(self.seen, dtype=np.uint64).reshape(-1, 2)

    def paths(self) -> Iterator[Path]:
        """The readable files, in the order of `table`."""
        unreadable = {path for path, _ in self.unreadable}
        for chunk in _chunks_of(self.listing, 1000):
            yield from (path for path, _ in chunk if path not in unreadable)

    def check_classes(self) -> None:
        """Raises InputError if there is a class of which no image could be read."""
        present = set(np.unique(self.table()[:, 1]).tolist())
        folders = enumerate(self.listing.classes.values())
        if empty := [shell_path(folder) for label, folder in folders if label not in present]:
            raise InputError(f"{name_some(empty)}: no readable images; replace them, or remove the class")


class FolderImages:
    """A source with the images in the train and test folders of `root`, as squares of `size` x `size` pixels.

    The images are sorted by class and file name and then shuffled with a fixed seed. Their order depends only on the
    file names, and the classes are mixed. Raises InputError if there are no class folders, if a class is empty,
    or if train and test have different classes. `findings` raises UnreadableImagesError if some images could not be
    read, unless `skip_unreadable` is set.
    """

    source = "folder"

    def __init__(self, root: Path, *, size: int = 32, skip_unreadable: bool = False) -> None:
        require_valid_limit()
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise InputError(f"--size must be {MIN_SIZE} to {MAX_SIZE}, got {size}")
        train, test, self._notes = list_splits(root)
        self.root, self.image_size, self.skip_unreadable = root, size, skip_unreadable
        self.classes = tuple(test.classes)
        self._readings = {
            name: _Reading(listing, unreadable=list(listing.broken))
            for name, listing in (("train", train), ("test", test))
        }

    def count(self, split: str) -> int:
        listing = self._readings[split].listing
        return len(listing.images) + len(listing.broken)

    def chunks(self, split: str) -> Generator[Split, None, None]:
        """Yields the readable images of a split, a few at a time. They are decoded in threads, because Pillow releases
        the GIL."""
        reading = self._readings[split]
        stop = Event()
        read = partial(_read_chunk, size=self.image_size, stop=stop)
        chunks = _chunks_of(reading.listing, images_per_chunk(self.image_size**2 * 3))
        for labeled, found in map_in_order(read, chunks, threads=num_threads(), stop=stop):
            images, labels = [], []
            for (path, label), result in zip(labeled, found, strict=True):
                if isinstance(result, str):
                    reading.unreadable.append((path, result))
                    continue
                reading.add(result, label)
                images.append(result.picture.pixels)
                labels.append(label)
            if images:
                yield Split(np.stack(images), np.array(labels, dtype=np.int64))

    def findings(self) -> Findings:
        train, test = self._readings.values()
        unreadable = train.unreadable + test.unreadable
        if unreadable and not self.skip_unreadable:
            raise UnreadableImagesError([f"{shell_path(path)} ({reason})" for path, reason in unreadable])
        for reading in (train, test) if train.listing.classes else (test,):
            reading.check_classes()
        notes = [*self._notes, *(line for reading in (train, test) if (line := reading.listing.note()))]
        tables = train.table(), test.table()
        repeated = duplicate_notes(*tables)
        files = duplicate_files(*tables, [*train.paths(), *test.paths()]) if repeated else []
        notes += _reading_notes(train, test) + repeated
        skipped = (printable(str(path.relative_to(self.root))) for path, _ in unreadable)
        return Findings(tuple(notes), tuple(skipped), tuple(files))


def _chunks_of(listing: Listing, size: int) -> Iterator[list[Labeled]]:
    """The files of a split, `size` at a time, in the order in which their images are written to the dataset."""
    order = np.random.default_rng(0).permutation(len(listing.images))
    for start in range(0, len(order), size):
        yield [listing.images[position] for position in order[start : start + size]]


def _read_chunk(labeled: list[Labeled], *, size: int, stop: Event) -> tuple[list[Labeled], list[_Read | str]]:
    """The files, and for each of them what was read, or why it cannot be read. Ends early if `stop` is set."""
    return labeled, [_read_one(path, size) for path, _ in labeled if not stop.is_set()]


def _read_one(path: Path, size: int) -> _Read | str:
    try:
        picture = read_picture(path, size)
    except Exception as error:  # decoders raise nearly anything for damaged files
        if due_to_machine(error):
            raise  # the file may be fine
        return why_unreadable(error)
    return _Read(picture, fingerprint(picture.pixels))


def _reading_notes(train: _Reading, test: _Reading) -> list[str]:
    notes = []
    if num_skipped := len(train.unreadable) + len(test.unreadable):
        notes.append(f"skipped {count_of(num_skipped, 'unreadable image file')}; dataset.json lists them")
    if num_ignored := train.metadata_ignored + test.metadata_ignored:
        notes.append(f"ignored unreadable metadata of {count_of(num_ignored, 'image file')}")
    if note := dark_note(max(train.brightest, test.brightest)):
        notes.append(note)
    return notes


def dark_note(brightest: int) -> str | None:
    """A line about 16-bit images that may have fewer bits of data. `brightest`: their largest value; -1: no images."""
    if not 0 <= brightest < DARK:
        return None
    return (
        f"the 16-bit images are dark: their largest value is {brightest} of 65535; "
        "if the files hold data of fewer bits, such as 12, scale it to the full range first"
    )
