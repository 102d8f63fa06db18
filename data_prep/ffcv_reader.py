"""Reads raw images from a beton file through FFCV.

This module works around problems of FFCV 1.0.2: its batches are views of a ring buffer, an exception in its thread
leaves the reader waiting forever, and an iterator that is not exhausted leaks its thread. `ffcv_import` avoids
further problems.
"""

import time
from collections.abc import Generator
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data_prep.encoding import checksum
from data_prep.ffcv_import import import_ffcv
from data_prep.watched_file import DamagedImage

STALL_SECONDS = 60.0
CLOSE_SECONDS = 10.0


class HostBatch(NamedTuple):
    """One batch in host memory. The tensors are valid until the next batch is requested."""

    images: Tensor  # (N, H, W, 3) uint8
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64: positions in the beton file


class FfcvReader:
    """Reads batches of `batch_size` images from `beton`, a file that has passed `check_beton`."""

    def __init__(self, beton: Path, batch_size: int, num_workers: int) -> None:
        self.beton = beton
        self._loader = _build_ffcv_loader(beton, batch_size, num_workers)
        self.count = int(self._loader.reader.num_samples)
        self.image_size = int(self._loader.reader.metadata["f0"]["height"][0])

    def read(self, order: np.ndarray) -> Generator[HostBatch, None, None]:
        """Yields batches of the images at positions `order` (N,).

        Raises RuntimeError if FFCV fails, and DamagedImage if an image is not the one that was written.
        """
        from ffcv.loader.epoch_iterator import EpochIterator

        iterator: Any = EpochIterator(self._loader, order.astype(np.uint64))  # type: ignore[arg-type]
        try:
            for _ in range(0, len(order), self._loader.batch_size):
                images, labels, indices, checksums = self._next(iterator)
                for image, index, wanted in zip(images.numpy(), indices.tolist(), checksums.tolist(), strict=True):
                    if checksum(image.data) != wanted[0]:
                        raise DamagedImage(self.beton, index[0], "its checksum differs")
                yield HostBatch(images, labels.flatten(), indices.flatten())
        finally:
            _close(iterator)

    def _next(self, iterator: Any) -> tuple[Tensor, ...]:
        waited = 0.0
        while waited < STALL_SECONDS:
            try:
                result = iterator.output_queue.get(timeout=1.0)
            except Empty:
                waited += 1.0
                if not iterator.is_alive() and iterator.output_queue.empty():
                    raise RuntimeError(
                        f"reading {self.beton} failed: FFCV's thread has ended (its error is printed above)"
                    ) from None
            else:
                if result is None:
                    raise RuntimeError(f"reading {self.beton} ended early")
                return result[1]
        raise RuntimeError(f"reading {self.beton} made no progress for {STALL_SECONDS:.0f} s")


def _build_ffcv_loader(beton: Path, batch_size: int, num_workers: int) -> Any:
    """FFCV's loader, with pipelines that return tensors on the host."""
    import_ffcv()
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor
    from numba import config

    return Loader(
        str(beton),
        batch_size=batch_size,
        num_workers=min(num_workers, config.NUMBA_NUM_THREADS),  # type: ignore[attr-defined]
        os_cache=True,
        seed=0,
        drop_last=False,
        pipelines={
            "image": [SimpleRGBImageDecoder(), ToTensor()],
            **{name: [IntDecoder(), ToTensor()] for name in ("label", "index", "checksum")},
        },
    )


def _close(iterator: Any) -> None:
    """Ends FFCV's thread. The queue is emptied meanwhile, because the thread may be waiting for space in it.

    A thread that is blocked in a read cannot be ended. It is left behind, and ends by itself after the read.
    """
    iterator.iter_ixes = iter(())  # no batch after the current one
    iterator.terminate_event.set()
    deadline = time.monotonic() + CLOSE_SECONDS
    while iterator.is_alive() and time.monotonic() < deadline:
        while not iterator.output_queue.empty():
            iterator.output_queue.get_nowait()
        iterator.join(timeout=0.01)
    iterator.close()
    iterator.closed = True  # otherwise, its finalizer would exit FFCV's memory context again
