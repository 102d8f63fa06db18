"""What the report computes from counts and probabilities: numpy alone, no drawing."""

import math
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
NUM_BINS = 15


class Calibration(NamedTuple):
    """Equal-width bins of the confidence, (NUM_BINS,) each; empty bins are NaN but in `counts`."""

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray
    error: float  # expected calibration error, 0 to 1


class Pair(NamedTuple):
    """Images of class `true` that were taken for class `predicted`."""

    true: int
    predicted: int
    images: int


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% interval of a share. total >= 1."""
    share, z2 = correct / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64: row the true class, column the predicted one."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def precision_and_recall(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C,) each; NaN for a class that was never predicted, or of which there is no image."""
    hits = confusion.diagonal().astype(float)
    totals = [confusion.sum(axis=axis) for axis in (0, 1)]
    precision, recall = (np.divide(hits, n, out=np.full_like(hits, np.nan), where=n > 0) for n in totals)
    return precision, recall


def confused_pairs(confusion: np.ndarray, limit: int) -> list[Pair]:
    """The most frequent mistakes, most frequent first; ties by class number."""
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:limit]
    pairs = [Pair(int(i) // len(mistakes), int(i) % len(mistakes), int(mistakes.flat[i])) for i in order]
    return [pair for pair in pairs if pair.images]


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> Calibration:
    """How often the predicted class is right, beside the probability it was given. Bins are (low, high]."""
    confidence = probabilities.max(axis=1).astype(float)
    hits = (probabilities.argmax(axis=1) == labels).astype(float)
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    empty = np.full(NUM_BINS, np.nan)
    means = [
        np.divide(np.bincount(bins, weights=value, minlength=NUM_BINS), counts, out=empty.copy(), where=counts > 0)
        for value in (confidence, hits)
    ]
    error = float(np.nansum(np.abs(means[0] - means[1]) * counts) / len(labels))
    return Calibration(means[0], means[1], counts, error)
