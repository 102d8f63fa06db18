"""Reads and decodes JPEG images from a beton file, in threads that work ahead of the caller.

FFCV's own decoder is not used, because it ignores errors. simplejpeg, which is used instead, releases the GIL.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_prep.beton import read_samples, read_sizes
from data_prep.encoding import checksum, decode_into
from data_prep.ffcv_reader import HostBatch
from data_prep.files import open_regular
from data_prep.parallel import map_in_order
from data_prep.watched_file import DamagedImage

CHUNK = 8  # images that a thread decodes at a time
BATCHES_AHEAD = 2

# A part of a batch to decode: (pixels of the whole batch, index of the part's first image, positions in the file)
Task = tuple[np.ndarray, int, np.ndarray]


class JpegReader:
    """Reads batches of `batch_size` images from `beton`, a file that has passed `check_beton`."""

    def __init__(self, beton: Path, batch_size: int, num_workers: int) -> None:
        self.beton, self.batch_size, self.num_workers = beton, batch_size, num_workers
        samples = read_samples(beton)
        self.count, self.image_size = len(samples), int(samples["image"]["width"][0])
        self._starts, self._sizes = samples["image"]["ptr"].astype(np.int64), read_sizes(beton)
        self._labels, self._checksums = samples["label"].astype(np.int64), samples["checksum"].astype(np.int64)

    def read(self, order: np.ndarray) -> Generator[HostBatch, None, None]:
        """Yields batches of the images at positions `order` (N,).

        Raises DamagedImage if an image differs from its checksum or cannot be decoded, and OSError if reading fails.
        """
        ahead = max(BATCHES_AHEAD * -(-self.batch_size // CHUNK), 2 * self.num_workers)
        with open_regular(self.beton) as file:  # not memory-mapped, so that truncation raises an error, not SIGBUS
            decode = partial(self._decode, file.fileno())
            decoded = map_in_order(decode, self._tasks(order), threads=self.num_workers, ahead=ahead)
            with closing(decoded):
                yield from self._batches(decoded, order)

    def _batches(self, decoded: Iterator[Task], order: np.ndarray) -> Iterator[HostBatch]:
        """Yields each batch when its last images have been decoded."""
        done = 0
        for images, first, positions in decoded:
            if first + len(positions) == len(images):
                indices = order[done : done + len(images)]
                done += len(images)
                labels = torch.from_numpy(self._labels[indices])
                yield HostBatch(torch.from_numpy(images), labels, torch.from_numpy(indices))

    def _tasks(self, order: np.ndarray) -> Iterator[Task]:
        size = self.image_size
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            images = np.empty((len(batch), size, size, 3), dtype=np.uint8)
            for first in range(0, len(batch), CHUNK):
                yield images, first, batch[first : first + CHUNK]

    def _decode(self, file: int, task: Task) -> Task:
        images, first, positions = task
        for pixels, position in zip(images[first:], positions.tolist(), strict=False):
            content = os.pread(file, int(self._sizes[position]), int(self._starts[position]))
            if checksum(content) != self._checksums[position]:
                raise DamagedImage(self.beton, position, "its checksum differs")
            try:
                decode_into(pixels, content)
            except ValueError as error:
                raise DamagedImage(self.beton, position, f"it cannot be decoded: {error}") from None
        return task
