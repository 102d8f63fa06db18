"""Sums that stay on the device, and the clock of training. Nothing here waits for the device by itself."""

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
    """Loss, hits and images since the last reset, added up on the device in float64.

    Sums and counts are divided once, at the end: a mean of batch means is wrong as soon as batches differ in size.
    """

    SIZE = 3

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(self.SIZE, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, hits: Tensor) -> None:
        """losses (N,) and hits (N,) bool, of one batch; neither is read by the host."""
        count = torch.full((), losses.numel(), dtype=torch.float64, device=losses.device)
        self.values += torch.stack((losses.sum(dtype=torch.float64), hits.sum(dtype=torch.float64), count))

    def reset(self) -> None:
        self.values.zero_()


def averages(sums: Tensor) -> Averages:
    """(3,) sums -> means. Waits for the device."""
    loss, hits, count = sums.tolist()
    return Averages(loss / max(count, 1), hits / max(count, 1), int(count))


class Stopwatch:
    """Seconds that it has run, over several starts and stops. It is stopped during an evaluation."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def read(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.seconds + running
