"""Random numbers depend only on the seed, the epoch, the image and the draw number, and pass statistical tests."""

import numpy as np
import torch

from data_prep.random_bits import below, coin, random_bits, uniform

MASK = (1 << 64) - 1


def reference(index: int, seed: int, epoch: int, draw: int) -> int:
    """Computes the 32 bits of one draw with Python's unbounded integers."""

    def mix(z: int) -> int:
        z &= MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix(mix(seed + golden) + (epoch + 1) * golden)
    return mix(mix(mix(index * golden + key)) + draw * golden) >> 32


def test_random_bits_match_the_published_finalizer_of_splitmix64() -> None:
    indices = torch.tensor([0, 1, 2, 49_999, 2**40])
    bits = random_bits(indices, seed=2**62 + 5, epoch=17, num_draws=3)
    for row in range(3):
        for column, index in enumerate(indices.tolist()):
            assert bits[row, column].item() == reference(index, 2**62 + 5, 17, row + 1)


def test_epoch_in_a_tensor_gives_the_same_bits() -> None:
    indices = torch.arange(100)
    for epoch in (-1, 0, 1, 6, 2**31):
        in_tensor = random_bits(indices, seed=2**62 + 5, epoch=torch.tensor(epoch), num_draws=3)
        assert torch.equal(in_tensor, random_bits(indices, seed=2**62 + 5, epoch=epoch, num_draws=3))


def test_the_draws_of_an_image_do_not_depend_on_its_batch() -> None:
    indices = torch.arange(1000)
    whole = random_bits(indices, seed=1, epoch=2, num_draws=4)
    some = torch.tensor([7, 3, 999])
    assert torch.equal(random_bits(some, seed=1, epoch=2, num_draws=4), whole[:, some])
    batches = random_bits(indices.view(10, 100), seed=1, epoch=2, num_draws=4)
    assert torch.equal(batches, whole.view(4, 10, 100).transpose(0, 1))


def test_numbers_fill_their_range_evenly() -> None:
    bits = random_bits(torch.arange(100_000), seed=0, epoch=0, num_draws=4)
    uniforms = uniform(bits)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    counts = torch.histc(uniforms[0], bins=100, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160, "chi-square with 99 degrees of freedom is too high"
    dice = torch.bincount(below(bits[1], 9), minlength=9)
    assert len(dice) == 9
    assert abs(coin(bits[2]).sum() - 50_000) < 5 * 158, "more than five standard deviations off"
    assert ((dice - 100_000 / 9) ** 2 / (100_000 / 9)).sum() < 35


def test_numbers_of_different_draws_samples_epochs_or_seeds_are_uncorrelated() -> None:
    def series(seed: int, epoch: int) -> torch.Tensor:
        return uniform(random_bits(torch.arange(20_000), seed=seed, epoch=epoch, num_draws=3))

    base = series(0, 0)
    columns = [*base, series(0, 1)[0], series(1, 0)[0], base[0].roll(1), series(0, -1)[0]]
    correlation = np.corrcoef(torch.stack(columns).numpy())
    assert np.abs(correlation - np.eye(len(columns))).max() < 0.035, "more than five standard deviations from 0"
