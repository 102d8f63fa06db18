"""`--balance`: classes of unequal size are drawn equally often, or weighted in the loss."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_prep.augment import AugmentedBatch, Augmenter
from data_prep.augment_config import AugmentConfig
from data_prep.loader import Batch
from data_prep.order import balanced_order, class_weights
from ddp_trainer.engine.evaluation import Evaluation
from ddp_trainer.engine.loss import losses_per_image

SIZES = (700, 90, 10, 1)
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3, 4], SIZES))  # class 2 has no images
SAMPLES = np.arange(1000, 1000 + len(LABELS))
COUNT = 12 * 64  # 768 draws in an epoch


def drawn(epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the samples, and how often each was drawn earlier; both (epochs, COUNT), from epoch 0 on."""
    orders = [balanced_order(SAMPLES, LABELS, count=COUNT, seed=3, epoch=epoch) for epoch in range(epochs)]
    return tuple(np.stack([order[field] for order in orders]) for field in (0, 1))  # type: ignore[return-value, arg-type]


def test_each_class_is_drawn_equally_often_in_an_epoch_and_over_all_epochs() -> None:
    samples, _ = drawn(5)
    for part in (*samples, samples.reshape(-1)):
        sizes = np.bincount(LABELS[part - 1000])[[0, 1, 3, 4]]
        assert sizes.max() - sizes.min() <= 1


def test_all_images_of_a_class_are_drawn_before_one_is_drawn_again() -> None:
    """In each round, all images of a class are drawn once. The last round may end early."""
    samples, earlier_draws = (column.reshape(-1) for column in drawn(5))
    for label, size in zip((0, 1, 3, 4), SIZES, strict=True):
        own, round_of = (column[LABELS[samples - 1000] == label] for column in (samples, earlier_draws))
        assert len(own) == 5 * COUNT // 4
        full = len(own) // size
        assert np.array_equal(np.bincount(round_of)[:full], np.full(full, size)), "a round has a wrong number of draws"
        assert len(np.unique(np.stack([own, round_of]), axis=1).T) == len(own), "an image is drawn twice in a round"


def test_order_is_shuffled_and_depends_only_on_seed_and_epoch() -> None:
    samples, earlier_draws = drawn(2)
    again = balanced_order(SAMPLES, LABELS, count=COUNT, seed=3, epoch=1)
    assert np.array_equal(samples[1], again.samples)
    assert np.array_equal(earlier_draws[1], again.earlier_draws)  # type: ignore[arg-type]
    assert not np.array_equal(samples[0], samples[1])
    assert not np.array_equal(samples[0], balanced_order(SAMPLES, LABELS, count=COUNT, seed=4, epoch=0).samples)
    assert all(len(set(LABELS[batch - 1000])) == 4 for batch in samples.reshape(-1, 64))


def batch_of(count: int) -> Batch:
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(images, torch.arange(count) % 10, torch.arange(count) // 2)  # each image index occurs twice


@pytest.mark.parametrize("mix", [{}, {"mixup": 0.4}, {"cutmix": 1.0}])
@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_an_image_that_was_drawn_n_times_is_augmented_as_in_epoch_n(flip: str, mix: dict[str, float]) -> None:
    augmenter = Augmenter(AugmentConfig(flip=flip, **mix), mean=(0.5,) * 3, std=(0.2,) * 3, seed=1)  # type: ignore[arg-type]
    batch, earlier_draws = batch_of(16), torch.arange(16) // 4
    by_draw = augmenter(batch, epoch=earlier_draws)
    for number in range(4):
        own, by_epoch = slice(4 * number, 4 * number + 4), augmenter(batch, epoch=number)
        for one, other in zip(by_draw, by_epoch, strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one[own], other[own])


def test_repeats_of_an_image_are_augmented_differently_and_mixup_pairs_share_a_weight() -> None:
    plain = Augmenter(AugmentConfig(), mean=(0.5,) * 3, std=(0.2,) * 3, seed=1)
    batch = Batch(batch_of(1).images.expand(64, -1, -1, -1), torch.zeros(64).long(), torch.zeros(64).long())
    images: AugmentedBatch = plain(batch, epoch=torch.arange(64))
    assert len(images.images.flatten(1).unique(dim=0)) > 40, "too few of the 162 combinations of crop and flip occur"
    mixed = Augmenter(AugmentConfig(mixup=1.0), mean=(0.5,) * 3, std=(0.2,) * 3, seed=1)(batch, epoch=torch.arange(64))
    assert mixed.label_weights is not None
    pairs = mixed.label_weights.view(-1, 2)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert len(pairs[:, 0].unique()) > 20


def test_class_weights_have_mean_1_over_the_images() -> None:
    weights = class_weights(LABELS, 5)
    assert weights[LABELS].mean() == pytest.approx(1)
    totals = weights[[0, 1, 3, 4]] * SIZES
    assert totals == pytest.approx(np.full(4, totals[0])), "the total weights of the classes differ"


def test_loss_of_a_mixed_image_mixes_the_weighted_losses_of_its_labels() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, partners, share = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 2, 2]), torch.tensor([0.3, 0.3, 0.9, 0.9])
    weights = torch.tensor([0.5, 2.0, 1.5])
    one, other = (
        weights[targets] * F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
        for targets in (labels, partners)
    )
    found = losses_per_image(logits, labels, None, None, label_smoothing=0.1, class_weights=weights)
    torch.testing.assert_close(found, one)
    found = losses_per_image(logits, labels, partners, share, label_smoothing=0.1, class_weights=weights)
    torch.testing.assert_close(found, share * one + (1 - share) * other)


def test_balanced_accuracy_is_the_mean_over_the_classes_that_have_images() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)
    logits = F.one_hot(torch.tensor([0] * 9 + [1]), 3).float()
    evaluation = Evaluation(np.arange(10), labels, logits, None)
    assert evaluation.correct == 9
    assert evaluation.balanced_accuracy == pytest.approx((1 + 0.5) / 2)
    assert evaluation.largest_class_share == pytest.approx(0.8)
