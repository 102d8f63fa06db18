"""Resized crops match torchvision, and do not depend on the batch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from data_prep.augment import Augmenter
from data_prep.augment_config import AugmentConfig
from data_prep.batch_ops import center_crop
from data_prep.errors import InputError
from data_prep.loader import Batch
from data_prep.resized_crop import (
    ROW_UNITS,
    WEIGHT_UNITS,
    _weights,
    batch_resized_crop,
    resize_by_products,
    resize_one_by_one,
    sides_of_areas,
)

BOTH = pytest.mark.parametrize("resize", [resize_one_by_one, resize_by_products])
Resize = Callable[..., Tensor]
Boxes = tuple[Tensor, Tensor, Tensor, Tensor]  # top, left, height, width


def noise(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


def boxes(count: int, height: int, width: int) -> Boxes:
    """Boxes of all sizes, from single pixels to the whole image."""
    generator = torch.Generator().manual_seed(width)
    sides = [torch.randint(1, side + 1, (count,), generator=generator) for side in (height, width)]
    for side, whole in zip(sides, (height, width), strict=True):
        side[:3] = torch.tensor([1, whole, whole - 1])
    corners = [
        (torch.rand(count, generator=generator) * (whole + 1 - side)).long()
        for side, whole in zip(sides, (height, width), strict=True)
    ]
    return corners[0], corners[1], sides[0], sides[1]


@BOTH
@pytest.mark.parametrize("whole", [(32, 32), (64, 64), (40, 57)])
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (49, 20)])
def test_crops_match_torchvision(resize: Resize, whole: tuple[int, int], size: tuple[int, int]) -> None:
    """The reference does not round. `resize_by_products` rounds to integers once, and `resize_one_by_one` twice."""
    images, places = noise(40, *whole), boxes(40, *whole)
    crops = resize(images, *places, size=size)
    assert crops.dtype == torch.uint8
    assert crops.is_contiguous(memory_format=torch.channels_last)
    for image, crop, *place in zip(images, crops, *(column.tolist() for column in places), strict=True):
        expected = reference.resized_crop(image.float(), *place, size=list(size), antialias=True)
        torch.testing.assert_close(crop.float(), expected, rtol=0, atol=0.7 if resize is resize_by_products else 1.05)


@BOTH
def test_crops_that_already_have_the_requested_size_are_not_interpolated(resize: Resize) -> None:
    images = noise(20, 32, 32)
    top, left = torch.arange(20) % 9, torch.arange(20) % 7
    side = torch.full((20,), 24)
    for image, crop, y, x in zip(images, resize(images, top, left, side, side, size=(24, 24)), top, left, strict=True):
        assert torch.equal(crop, image[:, y : y + 24, x : x + 24])


def test_weighted_sums_of_pixels_are_exact() -> None:
    images, (top, left, height, width) = noise(40, 48, 48), boxes(40, 48, 48)
    crops = resize_by_products(images, top, left, height, width, size=(24, 24))
    by_row, by_column = (_weights(top, height, old=48, new=24), _weights(left, width, old=48, new=24))
    for weights in (by_row, by_column):
        assert torch.equal(weights, weights.round())
        assert weights.min() >= 0
        assert (weights.sum(dim=2) == WEIGHT_UNITS).all()
    whole = torch.einsum("nyh,nchw->ncyw", by_row.long(), images.long())
    rows = (whole.double() * (ROW_UNITS / WEIGHT_UNITS)).round().long()
    exact = torch.einsum("ncyw,nxw->ncyx", rows, by_column.long()).double() / (ROW_UNITS * WEIGHT_UNITS)
    assert torch.equal(crops, exact.round().to(torch.uint8))


@BOTH
def test_crops_do_not_depend_on_the_batch(resize: Resize) -> None:
    images, places = noise(50, 40, 40), boxes(50, 40, 40)
    whole = resize(images, *places, size=(24, 24))
    for part in (torch.arange(7), torch.tensor([49, 3, 11]), torch.tensor([20])):
        some = resize(images[part], *(column[part] for column in places), size=(24, 24))
        assert torch.equal(some, whole[part])
    assert resize(images[:0], *(column[:0] for column in places), size=(24, 24)).shape == (0, 3, 24, 24)


def test_the_resizing_method_depends_on_the_device(device: torch.device) -> None:
    """Weights may be rounded differently on a GPU, so pixels may differ by 1."""
    images, places = noise(20, 40, 40), boxes(20, 40, 40)
    resize, tolerance = (resize_one_by_one, 0) if device.type == "cpu" else (resize_by_products, 1)
    expected = resize(images, *places, size=(24, 24))
    crops = batch_resized_crop(images.to(device), *(column.to(device) for column in places), size=(24, 24))
    torch.testing.assert_close(crops.cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(64, 64), (64, 72)])
def test_crops_have_the_requested_areas_and_evenly_spread_ratios(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shares, positions = (torch.rand(20_000, generator=generator) for _ in range(2))
    shares = 0.08 + 0.92 * shares
    height, width = sides_of_areas(shares, positions, size=size, ratios=(3 / 4, 4 / 3))
    assert (height >= 1).all()
    assert (height <= size[0]).all()
    assert (width >= 1).all()
    assert (width <= size[1]).all()
    small, logs = shares < 0.37, (width / height).log()  # these areas fit into the image with any of the ratios
    torch.testing.assert_close(((height * width) / math.prod(size))[small], shares[small], rtol=0.12, atol=0)
    assert logs[small].abs().max() < math.log(4 / 3) + 0.1  # not exact, because sides are whole pixels
    assert logs[small].mean().abs() < 0.01
    assert logs[small].std() == pytest.approx(2 * math.log(4 / 3) / 12**0.5, rel=0.02)
    assert (logs - math.log(size[1] / size[0]))[shares > 0.99].abs().max() < 0.05, (
        "the largest crops do not have the ratio of the image"
    )


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_areas_that_do_not_fit_with_any_requested_ratio_are_reduced(size: tuple[int, int]) -> None:
    height, width = sides_of_areas(torch.ones(3), torch.tensor([0.0, 0.5, 1.0]), size=size, ratios=(2.0, 3.0))
    assert (width.tolist(), height.tolist()) == ([32] * 3, [16] * 3)
    height, width = sides_of_areas(torch.ones(3), torch.tensor([0.0, 0.5, 1.0]), size=size, ratios=(0.2, 0.4))
    assert (width.tolist(), height.tolist()) == ([round(0.4 * size[0])] * 3, [size[0]] * 3)


def test_all_crops_have_a_requested_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    shares, positions = (torch.rand(20_000, generator=generator) for _ in range(2))
    height, width = sides_of_areas(0.08 + 0.92 * shares, positions, size=(224, 224), ratios=(1.2, 2.0))
    assert (width / height).min() > 1.2 * 0.98
    assert (width / height).max() < 2.0 * 1.02


def smooth(count: int) -> Batch:
    """Images of 64x64 pixels. The red value is four times the row, and the green value four times the column."""
    ramp = 4 * torch.arange(64, dtype=torch.uint8)
    image = torch.stack([color.expand(64, 64) for color in (ramp[:, None], ramp[None], torch.zeros_like(ramp))])
    images = image.expand(count, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.zeros(count, dtype=torch.long), torch.arange(count))


def test_random_resized_crops_have_the_requested_areas_and_cover_the_image() -> None:
    config = AugmentConfig(crop="random-resized", crop_scale=(0.25, 0.5), flip="none")
    augmenter = Augmenter(config, mean=(0.0,) * 3, std=(1 / 255,) * 3, seed=0)
    images = augmenter(smooth(2000), epoch=0).images / 4  # row and column of each pixel
    first, last = images[:, :, 0, 0], images[:, :, -1, -1]
    extent = (last - first)[:, :2] + 1  # approximate height and width of the crops
    shares, ratios = extent.prod(dim=1) / 64**2, extent[:, 1] / extent[:, 0]
    assert (shares.min(), shares.max()) == (pytest.approx(0.25, abs=0.03), pytest.approx(0.5, abs=0.03))
    assert shares.mean() == pytest.approx(0.375, abs=0.02)
    assert (ratios.min(), ratios.max()) == (pytest.approx(3 / 4, abs=0.05), pytest.approx(4 / 3, abs=0.05))
    assert (first[:, :2].amin(dim=0) < 1).all()
    assert (last[:, :2].amax(dim=0) > 62).all()
    starts = first[:, :2] / (64 - extent)  # 0 to 1: position within the range of possible positions
    assert starts.mean(dim=0).tolist() == [pytest.approx(0.5, abs=0.05)] * 2


def test_a_crop_with_fewer_pixels_shows_the_same_area() -> None:
    config = AugmentConfig(crop="random-resized", crop_scale=(0.35, 1.0))
    augmenter = Augmenter(config, mean=(0.0,) * 3, std=(1 / 255,) * 3, seed=0)
    large, small = (augmenter(smooth(200), epoch=0, side=side).images for side in (48, 24))
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    torch.testing.assert_close(small[:, :, 1:-1, 1:-1], shrunk[:, :, 1:-1, 1:-1], rtol=0, atol=2.0)


@pytest.mark.parametrize(("whole", "side"), [(256, 224), (33, 32), (35, 32), (32, 32)])
def test_center_crop_matches_torchvision(whole: int, side: int) -> None:
    images = noise(2, whole, whole)
    assert torch.equal(center_crop(images, side), reference.center_crop(images, [side]))


def test_invalid_areas_and_ratios_are_refused() -> None:
    for scale in ((0.0, 1.0), (0.5, 0.2), (0.5, 1.1), (math.nan, 1.0)):
        with pytest.raises(InputError, match="--crop-scale must be two shares in"):
            AugmentConfig(crop_scale=scale)
    for ratio in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf)):
        with pytest.raises(InputError, match="--crop-ratio must be two positive numbers"):
            AugmentConfig(crop_ratio=ratio)
