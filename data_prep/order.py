"""Which sample goes to which step and rank: one global order for each epoch, shared out among the ranks. Pure numpy.

A step's images depend on the seed and the epoch alone, never on the number of processes, so a run can be resumed, moved
and checked against a run of another size.
"""

import numpy as np


def epoch_order(samples: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `samples` (N,) for `epoch` (from 0).

    Seed and epoch enter separately: seed 0 in epoch 1 has nothing in common with seed 1 in epoch 0.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    return generator.permutation(np.asarray(samples, dtype=np.int64))


def train_batches(order: np.ndarray, *, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """(steps, batch_size // world_size) samples of `rank`: row s is its slice of the global batch of step s.

    The ranks' slices side by side are the global batch. Images at the end that do not fill a batch are left out: with
    another order in each epoch, they are others each time.
    """
    if batch_size % world_size:
        raise ValueError(f"{world_size} ranks cannot share a batch of {batch_size} evenly")
    steps, share = len(order) // batch_size, batch_size // world_size
    batches = order[: steps * batch_size].reshape(steps, batch_size)
    return batches[:, rank * share : (rank + 1) * share]


def evaluation_batches(samples: np.ndarray, *, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """Every world_size-th sample, from `rank` on, in pieces of `batch_size`.

    Every sample belongs to exactly one rank, and every rank gets the same number of pieces, the last of which may be
    empty: what the ranks do together after each piece, they do equally often.
    """
    mine = np.asarray(samples, dtype=np.int64)[rank::world_size]
    longest_shard = -(-len(samples) // world_size)
    return [mine[start : start + batch_size] for start in range(0, longest_shard, batch_size)]


def hold_out(labels: np.ndarray, *, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): sorted positions, `count` of them held out, each class by its share to within one image."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, len(labels)))))
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # Every (N / count)-th image of the list sorted by class: each class gets its share.
    picks = ((np.arange(count) + 0.5) * len(labels) / max(count, 1)).astype(np.int64)
    held_out = np.sort(by_class[picks])
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
