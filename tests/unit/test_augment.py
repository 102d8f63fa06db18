"""Augmentation: each operation matches a simple reference, and results do not depend on batch or rank."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.augment import AugmentedBatch, Augmenter
from data_prep.augment_config import AugmentConfig
from data_prep.batch_ops import (
    batch_crop,
    batch_cutmix,
    batch_cutout,
    batch_flip,
    batch_jitter,
    batch_mixup,
    batch_normalize,
)
from data_prep.errors import InputError
from data_prep.loader import Batch

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def pictures(count: int, height: int = 32, width: int = 32, *, channels_last: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


def batch_of(count: int, *, first: int = 0) -> Batch:
    return Batch(pictures(first + count)[first:], torch.arange(count) % 10, torch.arange(first, first + count))


@pytest.mark.parametrize("size", [(32, 32), (8, 12), (9, 7)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_crop_matches_a_simple_reference(size: tuple[int, int], channels_last: bool) -> None:
    images = pictures(81, *size, channels_last=channels_last)
    top, left = torch.arange(81) // 9, torch.arange(81) % 9
    for padding, (height, width) in ((4, size), (3, (size[0] - 2, size[1] - 2)), (0, (1, size[1] - 6))):
        top, left = top.clamp(max=size[0] + 2 * padding - height), left.clamp(max=size[1] + 2 * padding - width)
        cropped = batch_crop(images, top, left, size=(height, width), padding=padding)
        around = ((0, 0), (padding, padding), (padding, padding))
        for i in range(81):
            pad = np.pad(images[i].numpy(), around, mode="reflect")
            y, x = int(top[i]), int(left[i])
            assert np.array_equal(cropped[i].numpy(), pad[:, y : y + height, x : x + width])


@pytest.mark.parametrize("size", [(32, 32), (8, 12), (9, 7)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_flip_matches_a_simple_reference(size: tuple[int, int], channels_last: bool) -> None:
    images = pictures(6, *size, channels_last=channels_last)
    flipped = torch.tensor([True, False, False, True, True, False])
    for image, source, mirrored in zip(batch_flip(images, flipped), images, flipped, strict=True):
        assert np.array_equal(image.numpy(), source.numpy()[:, :, ::-1] if mirrored else source.numpy())


@pytest.mark.parametrize("side", [1, 8, 32, 40])
def test_cutout_matches_a_simple_reference(side: int) -> None:
    images = torch.randn(5, 3, 32, 32)
    top, left = torch.tensor([0, 3, 24, 31, 10]), torch.tensor([0, 30, 24, 0, 5])
    for i, image in enumerate(batch_cutout(images.clone(), top, left, side=side)):
        expected = images[i].clone()
        expected[:, top[i] : top[i] + side, left[i] : left[i] + side] = 0
        assert torch.equal(image, expected)


def test_normalize_equals_its_formula() -> None:
    images = pictures(3)
    expected = (images.double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    normalized = batch_normalize(images, MEAN, STD, torch.float32)
    torch.testing.assert_close(normalized.double(), expected, rtol=1e-5, atol=1e-6)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch_normalize(images, MEAN, STD, torch.float64), expected, rtol=1e-6, atol=1e-7)


def test_jitter_mixup_and_cutmix_match_simple_references() -> None:
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    shift, stretch = torch.tensor([0.0, 1.0, -1.0, 0.5]), torch.tensor([1.0, 2.0, 0.5, 1.0])
    for i, image in enumerate(batch_jitter(images.clone(), shift, stretch)):
        assert torch.equal(image, images[i] * stretch[i] + shift[i])
    weights = torch.tensor([0.3, 0.3, 1.0, 1.0])
    for i, image in enumerate(batch_mixup(images, weights)):
        torch.testing.assert_close(image, weights[i] * images[i] + (1 - weights[i]) * images[i ^ 1])
    top, left = torch.tensor([-2, -2, 6, 6]), torch.tensor([1, 1, 5, 5])
    mixed, own = batch_cutmix(images, top, left, torch.tensor([4, 4, 8, 8]), torch.tensor([3, 3, 8, 8]))
    for i in range(4):
        expected = images[i].clone()
        rows, columns = (slice(0, 2), slice(1, 4)) if i < 2 else (slice(6, 8), slice(5, 8))
        expected[:, rows, columns] = images[i ^ 1][:, rows, columns]
        assert torch.equal(mixed[i], expected)
    torch.testing.assert_close(own, 1 - torch.tensor([6.0, 6.0, 6.0, 6.0]) / 64)


EVERYTHING = [
    AugmentConfig(cutout=8),
    AugmentConfig(flip="alternating", brightness=0.2, contrast=0.3, mixup=0.4),
    AugmentConfig(crop_padding=2, flip="none", cutout=4, cutmix=1.0),
    AugmentConfig(crop="random-resized", crop_scale=(0.2, 0.9), cutout=8),
]


def concatenate(parts: list[AugmentedBatch]) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*parts, strict=True) if column[0] is not None]  # type: ignore[arg-type]


@pytest.mark.parametrize("config", EVERYTHING)
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("side", [None, 24])
def test_an_image_is_augmented_the_same_way_in_any_part_of_the_batch(
    config: AugmentConfig, parts: int, side: int | None
) -> None:
    whole = batch_of(64)
    augmenter = Augmenter(config, mean=MEAN, std=STD, seed=5)
    shares = [Batch(*pieces) for pieces in zip(*(column.chunk(parts) for column in whole), strict=True)]
    split = concatenate([augmenter(share, epoch=3, side=side) for share in shares])
    for one, other in zip(concatenate([augmenter(whole, epoch=3, side=side)]), split, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("config", EVERYTHING)
@pytest.mark.parametrize("side", [None, 16])
def test_only_seed_and_epoch_change_the_result(config: AugmentConfig, side: int | None) -> None:
    batch = batch_of(64)

    calls = itertools.count()

    def images(seed: int, epoch: int) -> torch.Tensor:
        torch.manual_seed(next(calls))  # the global seed must have no effect
        return Augmenter(config, mean=MEAN, std=STD, seed=seed)(batch, epoch=epoch, side=side).images

    first = images(0, 0)
    assert torch.equal(first, images(0, 0))
    assert not torch.equal(first, images(0, 1))
    assert not torch.equal(first, images(1, 0))
    assert torch.equal(batch.images, batch_of(64).images), "the input images have changed"
    assert first.is_contiguous(memory_format=torch.channels_last)


PLAIN = AugmentConfig(crop_padding=0, flip="none")


def augmented(config: AugmentConfig, batch: Batch) -> AugmentedBatch:
    return Augmenter(config, mean=MEAN, std=STD, seed=3)(batch, epoch=0)


def test_cutout_brightness_and_contrast_have_their_documented_effects() -> None:
    batch = batch_of(64)
    plain = augmented(PLAIN, batch).images
    cut = augmented(replace(PLAIN, cutout=8), batch).images
    assert ((cut == 0) & (plain != 0)).flatten(2).sum(dim=2).eq(64).all()
    assert len({tuple(torch.nonzero(image == 0)[0].tolist()) for image in cut}) > 32, "too few different positions"

    brighter = augmented(replace(PLAIN, brightness=0.3), batch).images - plain
    shifts = brighter.flatten(1).mean(dim=1)
    torch.testing.assert_close(brighter, shifts[:, None, None, None].expand_as(brighter), rtol=0, atol=1e-5)
    assert 0.2 < shifts.abs().max() <= 0.3
    assert len(set(shifts.tolist())) > 32
    steeper = augmented(replace(PLAIN, contrast=0.3), batch).images
    stretches = steeper.flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    torch.testing.assert_close(steeper, plain * stretches[:, None, None, None], rtol=1e-4, atol=1e-5)
    assert 0.2 < (stretches - 1).abs().max() <= 0.3 + 1e-5


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_labels_and_weights_match_the_mixed_images(mix: str) -> None:
    batch = batch_of(64)
    plain, mixed = augmented(PLAIN, batch).images, augmented(replace(PLAIN, **{mix: 1.0}), batch)  # type: ignore[arg-type]
    partner = torch.arange(64) ^ 1
    assert mixed.partner_labels is not None
    assert mixed.label_weights is not None
    assert torch.equal(mixed.partner_labels, batch.labels[partner])
    weights = mixed.label_weights[:, None, None, None]
    if mix == "mixup":
        torch.testing.assert_close(mixed.images, weights * plain + (1 - weights) * plain[partner], rtol=1e-4, atol=1e-5)
    else:
        kept = (mixed.images == plain).all(dim=1).flatten(1).float().mean(dim=1)
        torch.testing.assert_close(kept, mixed.label_weights, rtol=0, atol=0.02)  # some pixels are equal in both images


def test_alternating_flip_mirrors_each_image_in_every_other_epoch() -> None:
    batch = batch_of(200)
    augmenter = Augmenter(AugmentConfig(crop_padding=0, flip="alternating"), mean=MEAN, std=STD, seed=0)
    epochs = [augmenter(batch, epoch=epoch).images for epoch in range(3)]
    assert torch.equal(epochs[0], epochs[1].flip(3))
    assert torch.equal(epochs[0], epochs[2])
    plain = batch_normalize(batch.images, MEAN, STD, torch.float32)
    mirrored = (epochs[0] != plain).flatten(1).any(dim=1)
    assert 60 < mirrored.sum() < 140


def test_random_crops_and_flips_reach_every_position() -> None:
    count = 4000
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    images[:, :, 16, 10] = 255
    batch = Batch(images, torch.zeros(count, dtype=torch.long), torch.arange(count))
    augmenter = Augmenter(AugmentConfig(), mean=(0.0,) * 3, std=(1.0,) * 3, seed=0)
    places = augmenter(batch, epoch=0).images[:, 0].flatten(1).argmax(dim=1)
    rows, columns = places // 32, places % 32
    assert set(rows.tolist()) == set(range(12, 21))
    assert set(columns.tolist()) == set(range(6, 15)) | set(range(17, 26))
    assert torch.bincount(rows)[12:21].min() > count / 9 * 0.8


@pytest.mark.parametrize("side", [16, 24])
def test_small_crops_come_from_every_position(side: int) -> None:
    batch = batch_of(3000)
    augmenter = Augmenter(AugmentConfig(crop_padding=2, flip="none"), mean=MEAN, std=STD, seed=0)
    images = augmenter(batch, epoch=0, side=side).images
    assert images.shape[2:] == (side, side)
    padded = batch_normalize(
        torch.nn.functional.pad(batch.images.float(), (2,) * 4, mode="reflect").byte(), MEAN, STD, torch.float32
    )
    windows = padded[:, 0].unfold(1, side, 1).unfold(2, side, 1)
    found = (windows == images[:, 0, None, None]).all(dim=4).all(dim=3)  # (N, rows, columns)
    assert (found.sum(dim=(1, 2)) == 1).all()
    assert found.any(dim=0).all(), "a position does not occur"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_batches_can_be_augmented(count: int) -> None:
    augmented = Augmenter(AugmentConfig(cutout=8), mean=MEAN, std=STD, seed=0)(batch_of(count), epoch=0)
    assert augmented.images.shape == (count, 3, 32, 32)


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(InputError, match="--cutout must be 0 or more, got -1"):
        AugmentConfig(cutout=-1)
    with pytest.raises(InputError, match="cannot be combined"):
        AugmentConfig(mixup=0.2, cutmix=1.0)
