"""Keeps the images of a split in temporary files, called a spool.

FFCV's writer must know the number of images before it starts, but unreadable images are found only while they are read.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.encoding import checksum
from data_prep.sources import Split

RECORD = np.dtype([("start", "<i8"), ("size", "<i8"), ("label", "<i8"), ("checksum", "<i8")])


class SpoolWriter:
    """Appends encoded images to one file, and a record of each image to another."""

    def __init__(self, images: BinaryIO, records: BinaryIO, *, side: int, num_classes: int) -> None:
        self.count, self._side, self._num_classes = 0, side, num_classes
        self._images, self._records = images, records

    def add(self, chunk: Split, stored: Sequence[bytes]) -> None:
        """Adds images. `stored`: their encoded bytes. Raises ValueError if a shape, a type or a label is not valid."""
        images, labels = chunk
        self._check(images, labels)
        records = np.zeros(len(labels), RECORD)
        records["size"], records["label"] = [len(content) for content in stored], labels
        records["start"] = self._images.tell() + np.cumsum(records["size"]) - records["size"]
        records["checksum"] = [checksum(content) for content in stored]
        self._images.writelines(stored)
        self._records.write(records.data)
        self.count += len(labels)

    def _check(self, images: np.ndarray, labels: np.ndarray) -> None:
        if images.shape[1:] != (self._side, self._side, 3) or images.dtype != np.uint8 or not len(images):
            raise ValueError(
                f"images must be (N, {self._side}, {self._side}, 3) uint8 with N > 0, got {images.shape} {images.dtype}"
            )
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be integers of shape ({len(images)},), got {labels.shape} {labels.dtype}")
        lowest, highest, last_class = labels.min(), labels.max(), self._num_classes - 1
        if lowest < 0 or highest > last_class:
            raise ValueError(f"labels must be positions of classes, 0 to {last_class}; got {lowest} to {highest}")


@contextmanager
def open_spool(folder: Path, name: str, encoding: str, *, side: int, num_classes: int) -> Iterator[SpoolWriter]:
    """A writer of NAME.images and NAME.records in `folder`. On exit, writes the shape and the encoding to NAME.json."""
    with open(folder / f"{name}.images", "wb") as images, open(folder / f"{name}.records", "wb") as records:
        yield SpoolWriter(images, records, side=side, num_classes=num_classes)
    (folder / f"{name}.json").write_text(json.dumps({"shape": (side, side, 3), "encoding": encoding}))


class Spooled:
    """The samples of a spool: (encoded image, label, index, checksum). Reads one image at a time."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.shape, self.encoding = json.loads((folder / f"{name}.json").read_text()).values()
        self._images = folder / f"{name}.images"
        self._records = np.fromfile(folder / f"{name}.records", dtype=RECORD)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int, int, int]:
        start, size, label, stored_checksum = self._records[position].tolist()
        image = np.fromfile(self._images, dtype=np.uint8, count=size, offset=start)
        return image, label, int(position), stored_checksum
