"""Finds images that occur in both splits or in several classes, from 16 bytes per image: a fingerprint and a label."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.errors import shell_path
from data_prep.sources import count_of


def fingerprint(pixels: np.ndarray) -> int:
    """A 64-bit hash. Among a million different images, two have the same fingerprint with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")


def duplicate_notes(train: np.ndarray, test: np.ndarray) -> list[str]:
    """Lines about duplicate images. `train`, `test`: (N, 2) uint64, the fingerprint and label of each image."""
    notes = []
    if in_both := len(_in_both(train, test)):
        notes.append(
            f"warning: found {count_of(in_both, 'image')} in both train and test; the test accuracy will be too high"
        )
    if ambiguous := len(_in_several_classes(train, test)):
        notes.append(f"warning: found {count_of(ambiguous, 'image')} in more than one class")
    return notes


def duplicate_files(train: np.ndarray, test: np.ndarray, paths: Sequence[Path]) -> list[str]:
    """For each image that `duplicate_notes` counts, a line with its files. `paths`: files of train, then of test."""
    reported = np.union1d(_in_both(train, test), _in_several_classes(train, test))
    all_fingerprints = np.concatenate([train, test])[:, 0]
    files: dict[int, list[str]] = {}
    for position in np.flatnonzero(np.isin(all_fingerprints, reported)).tolist():
        files.setdefault(int(all_fingerprints[position]), []).append(shell_path(paths[position]))
    return [" ".join(sorted(same)) for same in files.values()]


def _in_both(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    return np.intersect1d(train[:, 0], test[:, 0])


def _in_several_classes(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    of_each_class = np.unique(np.concatenate([train, test]), axis=0)
    found, num_classes = np.unique(of_each_class[:, 0], return_counts=True)
    return found[num_classes > 1]
