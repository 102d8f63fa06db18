"""Running sums that stay on the device, their averages, and a stopwatch."""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor


class Averages(NamedTuple):
    """Means over training images."""

    loss: float
    accuracy: float
    num_images: int


class RunningSums:
    """Sums of losses, correct predictions (hits) and images since the last reset, on the device in float64.

    They are divided only at the end, because a mean of batch means is wrong if batches differ in size.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, hits: Tensor) -> None:
        """Adds a batch: `losses` (N,) and `hits` (N,) bool. Does not wait for the device."""
        count = torch.full((), losses.numel(), dtype=torch.float64, device=losses.device)
        self.values += torch.stack((losses.sum(dtype=torch.float64), hits.sum(dtype=torch.float64), count))

    def reset(self) -> None:
        self.values.zero_()


def averages(sums: Tensor) -> Averages:
    """The means of `sums` (3,): see `RunningSums`. NaN if all steps were skipped. Waits for the device."""
    loss, hits, count = sums.tolist()
    return Averages(loss / count, hits / count, int(count)) if count else Averages(math.nan, math.nan, 0)


class Stopwatch:
    """Adds up the seconds between its starts and stops."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.seconds, self._started = self.read(), None

    def read(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.seconds + running
