"""Reads and checks predictions.npz of a run, and lists the images for which the prediction is wrong.

The file may come from anywhere, so the header of every array is checked before the array is allocated. `run.outputs`
writes the file.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data_prep.errors import InputError, printable

MAX_BYTES = 2**30  # of all arrays together; enough for 50,000 images and 5,000 classes in float32
MAX_MISTAKES = 48
# The arrays in the file, and the kinds of NumPy dtypes that each may have: integers (i, u) or floats (f).
KINDS = {"indices": "iu", "labels": "iu", "probabilities": "f", "wrong_indices": "iu", "wrong_images": "u"}


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Labels and predictions of N evaluated images. Every label is a class number below C, the number of classes."""

    indices: np.ndarray  # (N,) integers, positions in the evaluated file
    labels: np.ndarray  # (N,) integers
    probabilities: np.ndarray  # (N, C) float, each in [0, 1]
    wrong_indices: np.ndarray  # (K,) integers, most confident mistake first
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
    """At most MAX_MISTAKES misclassified images, most confident mistake first."""
    rows = {int(index): row for row, index in enumerate(found.indices)}
    mistakes = []
    for sample, pixels in zip(found.wrong_indices[:MAX_MISTAKES].tolist(), found.wrong_images, strict=False):
        row = rows[sample]
        true, predicted = classes[int(found.labels[row])], classes[int(found.predicted[row])]
        mistakes.append(Mistake(sample, true, predicted, float(found.confidence[row]), pixels))
    return mistakes


class Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


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
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
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
    size = sum(header.dtype.itemsize * int(np.prod(header.shape, dtype=object)) for header in headers.values())
    if size > MAX_BYTES:
        raise _Misfit(f"its arrays take {size / 1e6:,.1f} MB; the limit is {MAX_BYTES / 1e6:,.1f} MB")
    if len(probabilities) != 2 or 0 in probabilities or labels != probabilities[:1]:
        raise _Misfit(f"the shapes of labels {labels} and probabilities {probabilities} do not match")
    if headers["indices"].shape != labels:
        raise _Misfit(f"the shapes of indices {headers['indices'].shape} and labels {labels} do not match")
    is_rgb = len(images) == 4 and images[3] == 3 and 0 not in images[1:] and headers["wrong_images"].dtype == np.uint8
    if not is_rgb or headers["wrong_indices"].shape != images[:1]:
        raise _Misfit(f"wrong_images must have one RGB image for each entry of wrong_indices, got shape {images}")


def _check_values(found: Predictions) -> None:
    num_classes = found.probabilities.shape[1]
    if not 0 <= found.labels.min() <= found.labels.max() < num_classes:
        raise _Misfit(f"labels must be whole numbers from 0 to {num_classes - 1}")
    if not (found.probabilities.min() >= 0 and found.probabilities.max() <= 1.001):  # refuses NaN, too
        raise _Misfit("probabilities must be in [0, 1]")
    if not np.isin(found.wrong_indices, found.indices).all():
        raise _Misfit("wrong_indices contains images that were not evaluated")
