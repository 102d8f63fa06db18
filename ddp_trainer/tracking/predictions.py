"""Reads and checks predictions.npz of a run, and lists the images for which the prediction is wrong.

The file may come from anywhere, so the header of every array is checked before the array is allocated. `run.outputs`
writes the file.
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data_prep.errors import InputError, printable

MAX_BYTES = 2**30  # of all arrays together; enough for 50,000 images and 5,000 classes in float32
# A file of a few kilobytes can stay below MAX_BYTES and still have so many images or classes that the report, which
# computes several values for each, would take hours.
MAX_IMAGES, MAX_CLASSES = 10_000_000, 100_000
MAX_MISTAKES = 48
# The arrays in the file, and the kinds of NumPy dtypes that each may have: integers (i, u) or floats (f).
KINDS = {"indices": "iu", "labels": "iu", "probabilities": "f", "wrong_indices": "iu", "wrong_images": "u"}


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Labels and predictions of N evaluated images. Every label is a class number below C, the number of classes."""

    indices: np.ndarray  # (N,) int64, positions in the evaluated file
    labels: np.ndarray  # (N,) int64
    probabilities: np.ndarray  # (N, C) float, each in [0, 1]
    wrong_indices: np.ndarray  # (K,) int64, most confident mistake first; K is at most MAX_MISTAKES
    wrong_images: np.ndarray  # (K, H, W, 3) uint8

    @cached_property
    def predicted(self) -> np.ndarray:
        """(N,) class with the highest probability."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def confidence(self) -> np.ndarray:
        """(N,) highest probability, float64."""
        return self.probabilities.max(axis=1).astype(float)

    @property
    def num_correct(self) -> int:
        return int((self.predicted == self.labels).sum())


class Mistake(NamedTuple):
    """One misclassified image."""

    sample: int  # its position in the evaluated file
    true: str  # name of the true class
    predicted: str  # name of the predicted class
    probability: float
    pixels: np.ndarray  # (H, W, 3) uint8


def most_confident_mistakes(found: Predictions, classes: Sequence[str]) -> list[Mistake]:
    """The misclassified images whose pixels are known, most confident mistake first."""
    mistakes = []
    for sample, pixels in zip(found.wrong_indices.tolist(), found.wrong_images, strict=True):
        row = int(np.argmax(found.indices == sample))
        true, predicted = classes[int(found.labels[row])], classes[int(found.predicted[row])]
        mistakes.append(Mistake(sample, true, predicted, float(found.confidence[row]), pixels))
    return mistakes


class Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def exceeded_limit(arrays: Mapping[str, Header] | Mapping[str, np.ndarray]) -> str:
    """Which limit the arrays of a file exceed, and by how much, for a message; empty if they exceed none."""
    num_bytes = sum(array.dtype.itemsize * int(np.prod(array.shape, dtype=object)) for array in arrays.values())
    num_images, num_classes = arrays["probabilities"].shape
    for found, limit, unit in (
        (num_bytes, MAX_BYTES, "bytes in its arrays"),
        (num_images, MAX_IMAGES, "images"),
        (num_classes, MAX_CLASSES, "classes"),
    ):
        if found > limit:
            return f"{found:,} {unit}; the limit is {limit:,}"
    return ""


def read_predictions(path: Path) -> Predictions | None:
    """The content of predictions.npz; None if there is no such file. Raises InputError if the content is invalid."""
    if not path.exists():
        return None
    if not path.is_file():
        raise InputError(f"{path} is not a regular file; remove it")
    try:
        found = _read_arrays(path)
    except _Misfit as misfit:
        raise InputError(f"{path}: {misfit}; train again or remove the file") from None
    except Exception as error:  # zipfile and NumPy may raise almost any exception for a damaged file
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise InputError(f"{path} cannot be read ({reason}); train again or remove the file") from None
    return found


class _Misfit(Exception):
    """Raised if an array is invalid. The message says what is wrong."""


def _read_arrays(path: Path) -> Predictions:
    with zipfile.ZipFile(path) as archive:
        headers = {name: _read_header(archive, name) for name in KINDS}
        _check_headers(headers)
        arrays = {}
        for name in KINDS:
            with archive.open(f"{name}.npy") as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
            # Small types would overflow in the arithmetic of the report.
            arrays[name] = array.astype(np.int64) if KINDS[name] == "iu" else array
    found = Predictions(**arrays)
    _check_values(found)
    return found


def _read_header(archive: zipfile.ZipFile, name: str) -> Header:
    """Shape and type of an array, after a check that they match the size of the array's file."""
    with archive.open(f"{name}.npy") as member:
        shape, dtype = _parse_header(member, name)
        length = member.tell()
    size = dtype.itemsize * int(np.prod(shape, dtype=object))
    if archive.getinfo(f"{name}.npy").file_size != length + size:
        raise _Misfit(f"the size of {name} does not match its header")
    return Header(shape, dtype)


def _parse_header(member: IO[bytes], name: str) -> Header:
    version = np.lib.format.read_magic(member)
    if version != (1, 0):  # NumPy writes this version for the arrays in KINDS; other versions allow very long headers
        raise _Misfit(f"{name} has a header of version {version[0]}.{version[1]}, not 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.kind not in KINDS[name] or dtype.itemsize > 8:
        raise _Misfit(f"{name} has an unsupported type: {str(dtype)[:30]}")
    return Header(shape, dtype)


def _check_headers(headers: dict[str, Header]) -> None:
    labels, probabilities, images = (headers[name].shape for name in ("labels", "probabilities", "wrong_images"))
    if len(probabilities) != 2 or 0 in probabilities or labels != probabilities[:1]:
        raise _Misfit(f"the shapes of labels {labels} and probabilities {probabilities} do not match")
    if excess := exceeded_limit(headers):
        raise _Misfit(f"it has {excess}")
    if headers["indices"].shape != labels:
        raise _Misfit(f"the shapes of indices {headers['indices'].shape} and labels {labels} do not match")
    is_rgb = len(images) == 4 and images[3] == 3 and 0 not in images[1:] and headers["wrong_images"].dtype == np.uint8
    if not is_rgb or headers["wrong_indices"].shape != images[:1]:
        raise _Misfit(f"wrong_images must have one RGB image for each entry of wrong_indices, got shape {images}")
    if images[0] > MAX_MISTAKES:
        raise _Misfit(f"wrong_images must have at most {MAX_MISTAKES} images, got {images[0]:,}")


def _check_values(found: Predictions) -> None:
    num_classes = found.probabilities.shape[1]
    if not 0 <= found.labels.min() <= found.labels.max() < num_classes:
        raise _Misfit(f"labels must be whole numbers from 0 to {num_classes - 1}")
    if not (found.probabilities.min() >= 0 and found.probabilities.max() <= 1.001):  # refuses NaN, too
        raise _Misfit("probabilities must be in [0, 1]")
    if not np.isin(found.wrong_indices, found.indices).all():
        raise _Misfit("wrong_indices contains images that were not evaluated")
