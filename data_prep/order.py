"""Decides which samples each step and rank gets: one global order per epoch, sliced by rank.

The images of a step depend on the seed and the epoch, never on the number of processes, so a run can be resumed with
another number of processes, and runs with different numbers of processes can be compared.
"""

from typing import NamedTuple

import numpy as np

from data_prep.errors import require


class Order(NamedTuple):
    """The samples of an epoch, or those of one rank in the epoch."""

    samples: np.ndarray  # positions in the beton file
    # How often each sample was drawn earlier in the run. None if no sample is drawn more than once in an epoch.
    earlier_draws: np.ndarray | None


def epoch_order(samples: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `samples` (N,) for `epoch` (0-based).

    Seed and epoch are separate inputs, so seed 0 in epoch 1 has nothing in common with seed 1 in epoch 0.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    return generator.permutation(np.asarray(samples, dtype=np.int64))


def balanced_order(samples: np.ndarray, labels: np.ndarray, *, count: int, seed: int, epoch: int) -> Order:
    """Makes `count` draws from `samples` (N,) for `epoch` (0-based), equally many from each class.

    `labels` (N,) are the classes of the samples. The numbers of draws from any two classes differ by at most one, in
    the epoch and over all epochs so far. Each class is like a deck of cards: all its images are drawn, in random order,
    before one of them is drawn again. This is a pure function, so it needs no state in a checkpoint.
    """
    classes, drawn, earlier_draws = np.unique(labels), [], []
    for place, label in enumerate(classes.tolist()):
        deck = np.asarray(samples, dtype=np.int64)[labels == label]
        # The draws of a run go to the classes in turn, and the draws of each class are numbered from 0 over the whole
        # run. `own`: the numbers of this class's draws in this epoch.
        own = np.arange(*(-(-(draws - place) // len(classes)) for draws in (epoch * count, (epoch + 1) * count)))
        rounds = own // len(deck)
        for number in np.unique(rounds).tolist():
            # label + 1, because NumPy treats (seed, number, 0) like (seed, number), which `epoch_order` uses.
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, number, label + 1))))
            drawn.append(generator.permutation(deck)[own[rounds == number] % len(deck)])
        earlier_draws.append(rounds)
    mixed = epoch_order(np.arange(count), seed=seed, epoch=epoch)
    return Order(np.concatenate(drawn)[mixed], np.concatenate(earlier_draws)[mixed])


def class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes,) weights of the classes, in inverse proportion to their sizes.

    `labels` (N,) are the classes of the images. The mean weight over the images is 1.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return len(labels) / np.count_nonzero(counts) / np.maximum(counts, 1)


def share(total: int, part: int, parts: int, *, pairs: bool = False) -> slice:
    """Divides `total` rows into `parts` consecutive shares, and returns the slice of share `part` (0-based).

    Sizes differ by at most one row, and share 0 is one of the smallest. With `pairs`, rows 2k and 2k + 1 stay together
    and sizes differ by at most one pair; `total` must be even.
    """
    unit = 2 if pairs else 1
    start, stop = (total // unit * place // parts * unit for place in (part, part + 1))
    return slice(start, stop)


def train_batches(order: np.ndarray, *, batch_size: int, rank: int, world_size: int, pairs: bool = False) -> np.ndarray:
    """(steps, n) samples of `rank`: row s is its `share` of the global batch of step s.

    Concatenated over ranks, the rows are the global batches. Leftover images (too few for a batch) are skipped. Each
    epoch has its own order, so different images are left over each time.
    """
    steps = len(order) // batch_size
    batches = order[: steps * batch_size].reshape(steps, batch_size)
    return batches[:, share(batch_size, rank, world_size, pairs=pairs)]


def evaluation_batches(samples: np.ndarray, *, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """Every world_size-th sample, starting at `rank`, in batches of `batch_size`.

    Every sample belongs to exactly one rank. If all ranks pass the same `batch_size`, they get the same number of
    batches, so that collective operations after each batch match. The last batch of a rank may be empty.
    """
    mine = np.asarray(samples, dtype=np.int64)[rank::world_size]
    longest_shard = -(-len(samples) // world_size)
    return [mine[start : start + batch_size] for start in range(0, longest_shard, batch_size)]


def hold_out(labels: np.ndarray, *, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): sorted positions of the images. `count` images are held out, in proportion to class sizes.

    Every class keeps at least one image to train on. Raises InputError if `count` is too large for that.
    """
    num_classes = len(np.unique(labels))
    require(
        count <= len(labels) - num_classes,
        f"--validation and --calibrate must leave one image of each of the {num_classes} classes to train on: "
        f"they can hold out at most {len(labels) - num_classes} of {len(labels)} images, got {count}",
    )
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, len(labels)))))
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # Picks every (N / count)-th image of the list sorted by class. The number of images picked from each class is
    # therefore proportional to the size of the class.
    picks = ((np.arange(count) + 0.5) * len(labels) / max(count, 1)).astype(np.int64)
    is_held_out = np.zeros(len(labels), dtype=bool)
    is_held_out[by_class[picks]] = True
    _return_images_to_empty_classes(is_held_out, labels, by_class)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _return_images_to_empty_classes(is_held_out: np.ndarray, labels: np.ndarray, by_class: np.ndarray) -> None:
    """Gives an image back to each class that has none to train on.

    An image of the class with the most training images is held out instead.
    """
    left = np.bincount(labels[~is_held_out], minlength=int(labels.max()) + 1)
    for label in np.unique(labels):
        if left[label] == 0:
            largest = int(left.argmax())
            returned = by_class[labels[by_class] == label][0]
            taken = next(position for position in by_class if labels[position] == largest and not is_held_out[position])
            is_held_out[returned], is_held_out[taken] = False, True
            left[label], left[largest] = 1, left[largest] - 1
