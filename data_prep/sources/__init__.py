"""Sources of images. A source provides uint8 images and class names, and knows nothing about beton files."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from data_prep.errors import InputError

SOURCES = ("cifar10", "cifar100", "folder", "synthetic")
MAX_NAMED = 5  # a message lists this many names, and only counts the others
CHUNK_BYTES = 2**20  # total size of the images that are handled at a time


class Split(NamedTuple):
    """Images and their labels, in the order in which the dataset stores them: a whole split or a part of it."""

    images: np.ndarray  # (N, H, W, 3) uint8
    labels: np.ndarray  # (N,) int64


class Findings(NamedTuple):
    """What was found while the images were read."""

    notes: tuple[str, ...] = ()  # lines for the user
    skipped: tuple[str, ...] = ()  # files that could not be read
    duplicates: tuple[str, ...] = ()  # for each image that is in both splits or several classes, a line with its files


class UnreadableImagesError(InputError):
    """Some image files cannot be read. `problems` has one line for each of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(
            f"{count_of(len(problems), 'image file')} cannot be read: {name_some(problems)}; "
            "replace or remove them, or add --skip-unreadable"
        )
        self.problems = list(problems)


class Source(Protocol):
    """Images that are read once. The caller reads all chunks of train, then those of test, then calls `findings`."""

    @property
    def source(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def image_size(self) -> int: ...

    def count(self, split: str) -> int:
        """The number of images in a split, known before any is read, so unreadable images are included."""
        ...

    def chunks(self, split: str) -> Generator[Split, None, None]:
        """Yields the images of a split, a few at a time and at most `count` in total."""
        ...

    def findings(self) -> Findings:
        """What was found while the images were read. Raises InputError if some of them cannot be used."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A source that keeps all images in memory."""

    source: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def image_size(self) -> int:
        return self.train.images.shape[1]

    def count(self, split: str) -> int:
        return len(getattr(self, split).labels)

    def chunks(self, split: str) -> Generator[Split, None, None]:
        images, labels = getattr(self, split)
        step = images_per_chunk(images[0].nbytes)
        for start in range(0, len(images), step):
            yield Split(images[start : start + step], labels[start : start + step])

    def findings(self) -> Findings:
        return Findings()


def images_per_chunk(image_bytes: int) -> int:
    return max(CHUNK_BYTES // image_bytes, 1)


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def name_some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
