"""The arithmetic of the report, in NumPy.

`confusion_counts` is the only function whose memory grows with the square of the number of classes.
"""

import math
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
NUM_BINS = 15


class Calibration(NamedTuple):
    """Predictions grouped by confidence into bins of equal width."""

    accuracy: np.ndarray  # (NUM_BINS,) share of correct predictions in each bin; NaN in an empty bin
    counts: np.ndarray  # (NUM_BINS,) number of predictions in each bin
    error: float  # expected calibration error, 0 to 1


class Pair(NamedTuple):
    """The number of images of class `true` for which class `predicted` was predicted."""

    true: int
    predicted: int
    images: int


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% interval of the share correct / total, with total >= 1 (Wilson, 1927)."""
    share, z2 = correct / total, Z95**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, center - half), min(1.0, center + half)


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64: a row for each true class, a column for each predicted one."""
    pairs = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(C,) int64: number of images of each class."""
    return np.bincount(labels.astype(np.int64), minlength=num_classes)


def precision_and_recall(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Two (C,) arrays. Precision is NaN for a class that was never predicted, and recall for a class without images."""
    hits = class_counts(labels[predicted == labels], num_classes).astype(float)
    totals = class_counts(predicted, num_classes), class_counts(labels, num_classes)
    precision, recall = (np.divide(hits, n, out=np.full_like(hits, np.nan), where=n > 0) for n in totals)
    return precision, recall


def confused_pairs(labels: np.ndarray, predicted: np.ndarray, limit: int) -> list[Pair]:
    """The `limit` most frequent mistakes, in descending order; pairs with equal counts are sorted by class numbers."""
    is_wrong, base = predicted != labels, int(predicted.max()) + 1
    # One number stands for each pair: np.unique takes several times as long for the columns of an array.
    pairs, counts = np.unique(labels[is_wrong].astype(np.int64) * base + predicted[is_wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [Pair(*divmod(int(pairs[place]), base), int(counts[place])) for place in order]


def calibration(labels: np.ndarray, predicted: np.ndarray, confidence: np.ndarray) -> Calibration:
    """Compares the confidence of predictions with their accuracy. Bins are (low, high]."""
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    expected, hits = (np.bincount(bins, weights=each, minlength=NUM_BINS) for each in (confidence, predicted == labels))
    accuracy = np.divide(hits, counts, out=np.full(NUM_BINS, np.nan), where=counts > 0)
    return Calibration(accuracy, counts, error=float(np.abs(expected - hits).sum() / len(labels)))
