"""The synthetic images are reproducible, balanced, and too hard for a linear classifier."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.sources import Split
from data_prep.sources.synthetic import draw_synthetic

# `make demo` must reach 90% on these images. A linear classifier must stay at least 25 points below that.
LINEAR_CEILING = 0.65


def best_linear_accuracy(train: Split, test: Split) -> float:
    """Test accuracy of ridge regression on raw pixels, with the regularization that is best on the test images."""
    mean = train.images.mean(axis=0, dtype=np.float32)
    pixels, unseen = (((split.images - mean) / 64).reshape(len(split.labels), -1) for split in (train, test))
    targets = np.eye(10)[train.labels] - 0.1
    values, vectors = np.linalg.eigh(pixels @ pixels.T)
    similar = unseen @ pixels.T
    accuracies = []
    for strength in np.logspace(0, 6, 13):
        weights = vectors @ ((vectors.T @ targets) / (values + strength)[:, None])
        accuracies.append(float(((similar @ weights).argmax(axis=1) == test.labels).mean()))
    return max(accuracies)


def test_a_linear_classifier_stays_far_below_the_network() -> None:
    drawn = draw_synthetic(train_count=1500, test_count=1000, seed=0)
    assert 0.1 < best_linear_accuracy(drawn.train, drawn.test) <= LINEAR_CEILING


def test_the_linear_classifier_can_learn() -> None:
    """The position of a bright band encodes the class, so the classifier has an easy task."""
    drawn = draw_synthetic(train_count=400, test_count=200, seed=0)
    for split in (drawn.train, drawn.test):
        for image, label in zip(split.images, split.labels, strict=True):
            image[3 * label : 3 * label + 3] = 255
    assert best_linear_accuracy(drawn.train, drawn.test) > 0.9


def test_the_seed_determines_every_pixel_and_the_splits_differ() -> None:
    first, again, other = (draw_synthetic(train_count=50, test_count=20, seed=seed) for seed in (3, 3, 4))
    for name in ("train", "test"):
        assert np.array_equal(getattr(first, name).images, getattr(again, name).images)
        assert not np.array_equal(getattr(first, name).images, getattr(other, name).images)
    assert not np.array_equal(first.train.images[:20], first.test.images)


def test_images_are_drawn_a_few_at_a_time_with_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.CHUNK_BYTES", 2**60)
    at_once = draw_synthetic(train_count=500, test_count=20, seed=0, size=48)
    monkeypatch.setattr("data_prep.sources.CHUNK_BYTES", 7 * 48 * 48 * 3)
    tracemalloc.start()
    drawn = draw_synthetic(train_count=500, test_count=20, seed=0, size=48)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(drawn.train.images, at_once.train.images)
    assert np.array_equal(drawn.test.images, at_once.test.images)
    assert peak < 1.5 * at_once.train.images.nbytes


@pytest.mark.parametrize("size", [8, 32, 48])
def test_classes_are_balanced_at_any_size(size: int) -> None:
    drawn = draw_synthetic(train_count=105, test_count=30, seed=0, size=size)
    assert drawn.train.images.shape == (105, size, size, 3)
    assert set(np.bincount(drawn.train.labels, minlength=10)) == {10, 11}
    assert set(np.bincount(drawn.test.labels, minlength=10)) == {3}


@pytest.mark.parametrize(
    "arguments", [{"train_count": 9}, {"test_count": 9}, {"train_count": 10**20}, {"size": 7}, {"size": 1025}]
)
def test_counts_and_sizes_out_of_range_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be"):
        draw_synthetic(**{"train_count": 20, "test_count": 20, "seed": 0, **arguments})


def test_dataset_json_has_all_keys_and_the_statistics_of_the_training_images(tiny_dir: Path) -> None:
    manifest = json.loads((tiny_dir / "dataset.json").read_text())
    assert set(manifest) == {
        *("format_version", "source", "classes", "image_size", "channels", "encoding", "splits", "mean", "std"),
        "ffcv_version",
    }
    images = draw_synthetic(train_count=96, test_count=40, seed=1).train.images / 255
    assert np.allclose(manifest["mean"], images.mean(axis=(0, 1, 2)))
    assert np.allclose(manifest["std"], images.std(axis=(0, 1, 2)))
