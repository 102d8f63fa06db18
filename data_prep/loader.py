"""Loads (images, labels, indices) from a beton file (FFCV's format) to the device, in exactly the requested order.

`StreamLoader` reads the file in every epoch. `ResidentLoader` reads it once and keeps the images in device memory. Both
give the same batches, bit for bit, and neither uses random numbers. Each image is compared with its checksum when it is
read.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.beton import holds_jpegs, tables_sha256
from data_prep.ffcv_reader import FfcvReader
from data_prep.free_memory import free_memory
from data_prep.jpeg_reader import JpegReader
from data_prep.manifest import SplitInfo
from data_prep.watched_file import DatasetChanged, WatchedFile

Mode = Literal["auto", "stream", "resident"]
IndexBatches = Sequence[np.ndarray] | np.ndarray  # positions in the file; each element or row is one batch
RESIDENT_SHARE = 0.25  # largest share of the free memory that images may take up in mode auto


class Batch(NamedTuple):
    """One batch on the device. The caller owns the tensors."""

    images: Tensor  # (N, 3, H, W) uint8, channels_last
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64: positions in the beton file


class StreamLoader:
    """Reads batches of at most `batch_size` images from `beton`, a file that has passed `check_beton`."""

    def __init__(
        self, beton: Path, *, device: torch.device, batch_size: int, num_workers: int, split: SplitInfo | None = None
    ) -> None:
        """`num_workers`: threads that read and decode; at most one per core is used.

        `split`: what dataset.json says about the file. With it, a file that only has a new timestamp or inode counts as
        unchanged. Raises DatasetChanged if the file does not match it, for example because it was replaced since
        dataset.json was read.
        """
        self.beton, self.device, self.batch_size = beton, device, batch_size
        self._file = WatchedFile(beton, split.sha256 if split else None)
        reader = JpegReader if holds_jpegs(beton) else FfcvReader
        self._reader = reader(beton, batch_size, min(num_workers, len(os.sched_getaffinity(0))))
        self.count, self.image_size = self._reader.count, self._reader.image_size
        if split and tables_sha256(beton) != split.tables_sha256:
            raise DatasetChanged(f"{beton} was replaced while this program started; start it again")
        self._to_device = _PinnedCopies(device) if device.type == "cuda" else _clone

    def batches(self, index_batches: IndexBatches) -> Iterator[Batch]:
        """Yields one batch for each array of positions. An empty array gives an empty batch.

        Each non-empty array must have `batch_size` positions; only the last one may have fewer. Raises ValueError for
        other sizes, and IndexError for positions outside the file. Raises DatasetChanged if the file changes while it
        is read or if the reader returns samples that were not requested, DamagedImage (a DatasetChanged) if an image is
        damaged, and RuntimeError or OSError if reading fails. If a file of raw images is truncated while it is read,
        the process may die of SIGBUS instead, because FFCV maps the file into memory.
        """
        order = _checked_order(index_batches, self.count, self.batch_size)
        self._file.check()
        with closing(self._reader.read(order)) as host_batches:
            for indices in index_batches:
                if len(indices) == 0:
                    yield self._empty()
                    continue
                images, labels, found = next(host_batches)
                if not np.array_equal(found.numpy(), indices):
                    problem = "has changed: reading it returned the wrong samples"
                    raise DatasetChanged(f"{self.beton} {problem}; restore the file or prepare the data again")
                self._file.check()  # again, because the file may have changed during the read
                yield Batch(*self._to_device(images.permute(0, 3, 1, 2), labels, found))

    def _empty(self) -> Batch:
        images = torch.empty((0, self.image_size, self.image_size, 3), dtype=torch.uint8, device=self.device)
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        return Batch(images.permute(0, 3, 1, 2), none, none.clone())


class ResidentLoader:
    """Keeps all images of a StreamLoader in device memory."""

    def __init__(self, stream: StreamLoader) -> None:
        self.batch_size, self.count, size = stream.batch_size, stream.count, stream.image_size
        self._images = torch.empty((self.count, size, size, 3), dtype=torch.uint8, device=stream.device)
        self._labels = torch.empty(self.count, dtype=torch.int64, device=stream.device)
        for batch in stream.batches(_in_batches(np.arange(self.count), self.batch_size)):
            self._images[batch.indices] = batch.images.permute(0, 2, 3, 1)
            self._labels[batch.indices] = batch.labels

    def batches(self, index_batches: IndexBatches) -> Iterator[Batch]:
        """Yields the same batches as StreamLoader.batches. The arrays may have any sizes.

        Raises IndexError for positions outside the file.
        """
        order = torch.from_numpy(_checked_order(index_batches, self.count)).to(self._images.device)
        start = 0
        for indices in index_batches:
            chosen = order[start : start + len(indices)].clone()
            start += len(indices)
            images = self._images.index_select(0, chosen).permute(0, 3, 1, 2)
            yield Batch(images, self._labels.index_select(0, chosen), chosen)


def build_loader(
    beton: Path, *, mode: Mode, device: torch.device, batch_size: int, num_workers: int, split: SplitInfo | None = None
) -> StreamLoader | ResidentLoader:
    """A loader for `mode`. auto: resident if the images take less than a quarter of the free device memory."""
    stream = StreamLoader(beton, device=device, batch_size=batch_size, num_workers=num_workers, split=split)
    return ResidentLoader(stream) if resident_bytes(stream.count, stream.image_size, mode, device) else stream


def resident_bytes(count: int, image_size: int, mode: Mode, device: torch.device) -> int:
    """Bytes of device memory that `count` images will take up; 0 if they are streamed."""
    needed = count * image_size**2 * 3
    if mode == "auto":
        mode = "resident" if needed < RESIDENT_SHARE * free_memory(device) else "stream"
    return needed if mode == "resident" else 0


def read_images(loader: StreamLoader | ResidentLoader, samples: np.ndarray) -> Tensor:
    """(N,) positions, N > 0 -> (N, 3, H, W) uint8 images on the device, in that order."""
    return torch.cat([batch.images for batch in loader.batches(_in_batches(samples, loader.batch_size))])


def _in_batches(samples: np.ndarray, size: int) -> list[np.ndarray]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _checked_order(index_batches: IndexBatches, count: int, batch_size: int | None = None) -> np.ndarray:
    """All positions in one array, (K,) int64. Raises IndexError or ValueError for wrong positions or batch sizes."""
    filled = [np.asarray(indices, dtype=np.int64) for indices in index_batches if len(indices)]
    order = np.concatenate(filled) if filled else np.empty(0, dtype=np.int64)
    if len(order) and not (order.min() >= 0 and order.max() < count):
        limits = f"0 to {count - 1}, because the file has {count} samples"
        raise IndexError(f"positions must be {limits}; got {order.min()} to {order.max()}")
    for number, indices in enumerate(filled, start=1):
        size, is_last = len(indices), number == len(filled)
        if batch_size and (size > batch_size or (size < batch_size and not is_last)):
            raise ValueError(f"a batch must have {batch_size} samples, or fewer if it is the last; got {size}")
    return order


def _clone(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies with the same strides. FFCV returns views of a ring buffer, which it will overwrite."""
    return tuple(tensor.clone() for tensor in tensors)


class _PinnedCopies:
    """Copies host tensors to the GPU through page-locked buffers, on a CUDA stream of its own.

    The batches take turns in NUM_SLOTS slots. Each slot has one buffer for each tensor of a batch. The training stream
    waits for each copy. The host waits only if the previous copy from the same slot is still running.
    """

    NUM_SLOTS = 3

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slots: list[list[Tensor] | None] = [None] * self.NUM_SLOTS
        self._done = [torch.cuda.Event() for _ in range(self.NUM_SLOTS)]
        self._turn = 0

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        turn, self._turn = self._turn, (self._turn + 1) % self.NUM_SLOTS
        self._done[turn].synchronize()
        pinned = self._slots[turn]
        if pinned is None or any(buffer.shape != tensor.shape for buffer, tensor in zip(pinned, tensors, strict=True)):
            with torch.inference_mode(False):  # training could not fill buffers made in inference mode
                pinned = self._slots[turn] = [torch.empty_like(tensor).pin_memory() for tensor in tensors]
        for buffer, tensor in zip(pinned, tensors, strict=True):
            buffer.copy_(tensor)
        with torch.cuda.stream(self._stream):
            copies = tuple(buffer.to(self._device, non_blocking=True) for buffer in pinned)
            self._done[turn].record(self._stream)
        training_stream = torch.cuda.current_stream(self._device)
        training_stream.wait_event(self._done[turn])
        for copy in copies:
            copy.record_stream(training_stream)
        return copies
