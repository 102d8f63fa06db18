"""Counts images that occur in both splits or in several classes. Needs 16 bytes of memory per image."""

import hashlib

import numpy as np

from data_prep.sources import count_of


def fingerprint(pixels: np.ndarray) -> int:
    """A 64-bit hash. The probability that any two of a million different images have the same fingerprint is 3e-8."""
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")


def duplicate_notes(train: np.ndarray, test: np.ndarray) -> list[str]:
    """Lines about duplicate images. `train`, `test`: (N, 2) uint64, the fingerprint and label of each image."""
    notes = []
    if in_both := len(np.intersect1d(train[:, 0], test[:, 0])):
        notes.append(
            f"warning: found {count_of(in_both, 'image')} in both train and test; the test accuracy will be too high"
        )
    of_each_class = np.unique(np.concatenate([train, test]), axis=0)
    _, num_classes = np.unique(of_each_class[:, 0], return_counts=True)
    if ambiguous := int((num_classes > 1).sum()):
        notes.append(f"warning: found {count_of(ambiguous, 'image')} in more than one class")
    return notes
