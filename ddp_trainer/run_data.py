"""The images of one run: those to train on, in which order, and those to evaluate on."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data_prep.augment import Augmenter
from data_prep.loader import ResidentLoader, StreamLoader
from data_prep.order import epoch_order
from ddp_trainer.evaluate import Evaluator


class HardImages(NamedTuple):
    """Which of the candidates of each step are trained on, and what it took to find them."""

    marks: Tensor  # (epochs, K) uint8: a bit for each image of an epoch's order, 1 to train on it
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What is read, how it is augmented, and what of it is trained on."""

    loader: StreamLoader | ResidentLoader
    samples: np.ndarray  # (N,) positions in the beton file; held-out ones are not among them
    augmenter: Augmenter
    evaluator: Evaluator
    hard: HardImages | None = None

    def order(self, *, seed: int, epoch: int) -> np.ndarray:
        """Positions of the images to train on in `epoch` (from 0), the same on every rank."""
        order = epoch_order(self.samples, seed=seed, epoch=epoch)
        if self.hard is None:
            return order
        return order[np.unpackbits(self.hard.marks[epoch].numpy(), count=len(order)).astype(bool)]
