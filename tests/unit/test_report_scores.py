"""The report's scores match slow, simple reference code."""

import math
from collections import Counter

import numpy as np
import pytest

from ddp_trainer.report.scores import (
    NUM_BINS,
    Z95,
    calibration,
    confused_pairs,
    confusion_counts,
    precision_and_recall,
    wilson_interval,
)
from tests.support.run_directories import draw_predictions


def test_wilson_interval_solves_its_equation():
    for correct, total in ((0, 5), (5, 5), (1, 3), (9612, 10000)):
        low, high = wilson_interval(correct, total)
        assert 0 <= low <= correct / total <= high <= 1
        # Each end is Z95 standard errors away from correct / total. The standard error is computed from that end.
        for end in {low, high} - {0.0, 1.0}:
            assert abs(correct / total - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / total))


def test_counts_precision_recall_and_confused_pairs_match_plain_loops():
    found = draw_predictions(7)
    labels, predicted = found["labels"], found["probabilities"].argmax(axis=1)
    seen = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    confusion = confusion_counts(labels, predicted, 8)  # the eighth class does not occur
    assert confusion.sum() == len(labels)
    assert all(confusion[true, other] == seen[true, other] for true in range(8) for other in range(8))
    precision, recall = precision_and_recall(labels, predicted, 8)
    for label in range(7):
        hits = seen[label, label]
        assert precision[label] == hits / sum(n for (_, other), n in seen.items() if other == label)
        assert recall[label] == hits / sum(n for (true, _), n in seen.items() if true == label)
    assert math.isnan(precision[7]) and math.isnan(recall[7])
    pairs = confused_pairs(labels, predicted, 100)
    mistakes = {key: n for key, n in seen.items() if key[0] != key[1]}
    assert {(pair.true, pair.predicted): pair.images for pair in pairs} == mistakes
    assert [pair.images for pair in pairs] == sorted((pair.images for pair in pairs), reverse=True)


def test_calibration_error_matches_a_loop_over_bins():
    found = draw_predictions(4, count=500)
    confidence = found["probabilities"].max(axis=1).astype(float)
    hits = found["probabilities"].argmax(axis=1) == found["labels"]
    expected = 0.0
    for number in range(NUM_BINS):
        inside = (confidence > number / NUM_BINS) & (confidence <= (number + 1) / NUM_BINS)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - hits[inside].mean())
    predicted = found["probabilities"].argmax(axis=1)
    measured = calibration(found["labels"], predicted, confidence)
    assert measured.error == pytest.approx(expected, abs=1e-12)
    assert measured.counts.sum() == 500
    sure = calibration(np.zeros(5, np.int64), np.zeros(5, np.int64), np.ones(5))
    assert sure.error == 0 and sure.counts[-1] == 5
