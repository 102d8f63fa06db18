"""Measures the speed of loaders, which take turns for several rounds."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_prep.augment import Augmenter
from data_prep.loader import ResidentLoader, StreamLoader
from data_prep.order import epoch_order, train_batches

WORKERS = len(os.sched_getaffinity(0))  # one per core

Epoch = Callable[[], Iterable[torch.Tensor]]  # produces the images of an epoch, in batches


class OurEpochs:
    """Produces one epoch of batches per call, shuffled as in training.

    Without an `augmenter`, the images are yielded as they were loaded.
    """

    def __init__(
        self,
        loader: StreamLoader | ResidentLoader,
        samples: np.ndarray,
        augmenter: Augmenter | None = None,
        side: int | None = None,
    ) -> None:
        """`side`: side of the augmented images; default: that of the loaded images."""
        self.loader, self.samples, self.augmenter, self.side, self.epoch = loader, samples, augmenter, side, 0

    def __call__(self) -> Iterable[torch.Tensor]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = epoch_order(self.samples, seed=0, epoch=epoch)
        positions = train_batches(order, batch_size=self.loader.batch_size, rank=0, world_size=1)
        for batch in self.loader.batches(positions):
            if self.augmenter is None:
                yield batch.images
            else:
                yield self.augmenter(batch, epoch=epoch, side=self.side).images


def torchvision_epochs(dataset: Dataset, *, batch_size: int, device: torch.device) -> Epoch:
    """Returns an `Epoch` of a DataLoader with one worker per core. The items of `dataset` are (image, label)."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    return lambda: (images for images, _ in loader)


def compare(
    loaders: Mapping[str, Epoch], beside: Mapping[str, str], *, rounds: int, device: torch.device
) -> dict[str, float]:
    """Images/s of each loader, and for each pair in `beside`, the first loader's images/s divided by the second's.

    All are medians over `rounds`. In each round, the loaders run one after another. The first round, in which workers
    start and files enter the page cache, does not count. Prints the rounds and the figures.
    """
    measured: list[dict[str, float]] = []
    for number in range(rounds + 1):
        rates = {name: _rate(epoch(), device) for name, epoch in loaders.items()}
        if number:
            measured.append(rates)
            print(f"round {number}: " + "  ".join(f"{name} {value:.0f}" for name, value in rates.items()), flush=True)
    figures = {f"{name}_images_per_second": statistics.median(r[name] for r in measured) for name in loaders}
    for name, other in beside.items():
        figures[f"{name}_beside_{other}"] = statistics.median(r[name] / r[other] for r in measured)
    for name, value in figures.items():
        print(f"{name:48} {value:12.2f}")
    return figures


def _rate(batches: Iterable[torch.Tensor], device: torch.device) -> float:
    """Images/s, measured from the request for the first batch until the last batch is on the device."""
    start, count = time.perf_counter(), 0
    for images in batches:
        count += len(images.to(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count / (time.perf_counter() - start)
