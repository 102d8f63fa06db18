"""Where images come from. A source returns uint8 arrays and class names and knows nothing about beton files."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SOURCES = ("cifar10", "cifar100", "folder", "synthetic")
NUM_NAMED = 5  # names that a message lists; the others are only counted


class Split(NamedTuple):
    """Images and their labels, in the order they are written."""

    images: np.ndarray  # (N, H, W, 3) uint8
    labels: np.ndarray  # (N,) int64


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A whole dataset in memory."""

    source: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    notes: tuple[str, ...] = ()  # lines for the user about what was found
    skipped: tuple[str, ...] = ()  # files that could not be read
