"""Each rank takes a slice of each global batch. No image is repeated, and only leftover images are skipped."""

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.order import epoch_order, evaluation_batches, hold_out, share, train_batches

SAMPLES = np.arange(1000, 2003)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_only() -> None:
    order = epoch_order(SAMPLES, seed=3, epoch=5)
    assert np.array_equal(np.sort(order), SAMPLES)
    assert np.array_equal(order, epoch_order(SAMPLES, seed=3, epoch=5))


def test_neighboring_seeds_and_epochs_have_unrelated_orders() -> None:
    orders = [epoch_order(SAMPLES, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("pairs", [False, True])
def test_the_slices_of_the_ranks_make_up_each_global_batch(world_size: int, pairs: bool) -> None:
    order = epoch_order(SAMPLES, seed=0, epoch=0)
    ranks = [
        train_batches(order, batch_size=100, rank=rank, world_size=world_size, pairs=pairs)
        for rank in range(world_size)
    ]
    assert np.array_equal(np.concatenate(ranks, axis=1), train_batches(order, batch_size=100, rank=0, world_size=1))
    seen = np.concatenate(ranks, axis=1).reshape(-1)
    assert len(set(seen)) == len(seen) == 1000, (
        "the epoch repeats an image, or leaves out more than the 3 leftover images"
    )


@pytest.mark.parametrize("total", [500, 512, 14, 15])
@pytest.mark.parametrize("parts", range(1, 9))
@pytest.mark.parametrize("unit", [1, 2])
def test_the_shares_of_the_ranks_differ_by_at_most_one_image_or_pair(total: int, parts: int, unit: int) -> None:
    total -= total % unit
    shares = [share(total, part, parts, pairs=unit == 2) for part in range(parts)]
    sizes = [rows.stop - rows.start for rows in shares]
    assert sum(sizes) == total
    assert all(size % unit == 0 for size in sizes), "a pair is split"
    assert max(sizes) - min(sizes) in (0, unit)
    assert sizes[0] == min(sizes)
    if total % (parts * unit) == 0:
        assert set(sizes) == {total // parts}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 6, 50, 1003])
@pytest.mark.parametrize("batch_size", [1, 10, 500])
def test_evaluation_uses_every_sample_once_and_every_rank_gets_the_same_number_of_batches(
    world_size: int, count: int, batch_size: int
) -> None:
    samples = SAMPLES[:count]
    shards = [
        evaluation_batches(samples, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert np.array_equal(np.sort(np.concatenate([batch for shard in shards for batch in shard])), samples)
    assert len({len(shard) for shard in shards}) == 1
    for shard in shards:
        filled = [len(batch) for batch in shard if len(batch)]
        assert all(length == batch_size for length in filled[:-1])


@pytest.mark.parametrize("count", [0, 1, 100, 900])
def test_held_out_images_are_stratified(count: int) -> None:
    labels = np.random.default_rng(0).choice(7, size=1003, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    kept, held_out = hold_out(labels, count=count, seed=4)
    assert len(held_out) == count
    assert np.array_equal(np.sort(np.concatenate((kept, held_out))), np.arange(1003))
    for label in range(7):
        expected = (labels == label).sum() * count / 1003
        assert abs((labels[held_out] == label).sum() - expected) <= 1
    if count:
        assert not np.array_equal(held_out, hold_out(labels, count=count, seed=5)[1])


@pytest.mark.parametrize("images_per_class", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 8, 39])
def test_validation_leaves_every_class_an_image_to_train_on(images_per_class: int, count: int) -> None:
    """One class is large and forty are small. A simple split could hold out all images of a small class."""
    labels = np.concatenate([np.repeat(np.arange(40), images_per_class), np.full(60, 40)])
    kept, held_out = hold_out(labels, count=count, seed=0)
    assert len(held_out) == count
    assert np.array_equal(np.sort(np.concatenate((kept, held_out))), np.arange(len(labels)))
    assert set(labels[kept]) == set(range(41))


def test_validation_that_would_hold_out_a_whole_class_is_refused() -> None:
    labels = np.arange(10) % 5
    assert set(labels[hold_out(labels, count=5, seed=0)[0]]) == set(range(5))
    with pytest.raises(InputError, match="at most 5 of 10 images, got 6"):
        hold_out(labels, count=6, seed=0)
