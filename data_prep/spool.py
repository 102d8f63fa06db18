"""The images of one split on their way to FFCV's writer: they wait in files, because it needs their number first."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.sources import Split


class SpoolWriter:
    """Appends images of equal shape, and their labels, to two files."""

    def __init__(self, images: BinaryIO, labels: BinaryIO) -> None:
        self.count, self.shape = 0, ()
        self._images, self._labels = images, labels

    def add(self, chunk: Split) -> None:
        """Raises ValueError for arrays that FFCV's writer cannot write."""
        images, labels = chunk
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not len(images):
            raise ValueError(f"images must be (N, H, W, 3) uint8 with N > 0, got {images.shape} {images.dtype}")
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise ValueError(f"labels must be ({len(images)},) integers from 0, got {labels.shape} {labels.dtype}")
        self.shape = self.shape or images.shape[1:]
        if images.shape[1:] != self.shape:
            raise ValueError(f"all images must have the shape {self.shape}, got {images.shape[1:]}")
        self._images.write(np.ascontiguousarray(images).data)
        self._labels.write(labels.astype("<i8").data)
        self.count += len(labels)


@contextmanager
def open_spool(folder: Path, name: str) -> Iterator[SpoolWriter]:
    """Writes NAME.images and NAME.labels in `folder`, and at the end NAME.json, which describes them."""
    with open(folder / f"{name}.images", "wb") as images, open(folder / f"{name}.labels", "wb") as labels:
        writer = SpoolWriter(images, labels)
        yield writer
    (folder / f"{name}.json").write_text(json.dumps({"shape": writer.shape}))


class Spooled:
    """The samples of a spool: (image, label, index). Reads one image at a time, so that memory stays bounded."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._shape = json.loads((folder / f"{name}.json").read_text())["shape"]
        self._images = folder / f"{name}.images"
        self._labels = np.fromfile(folder / f"{name}.labels", dtype="<i8")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int, int]:
        size = int(np.prod(self._shape))
        image = np.fromfile(self._images, dtype=np.uint8, count=size, offset=position * size)
        return image.reshape(self._shape), int(self._labels[position]), int(position)
