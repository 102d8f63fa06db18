"""Crops each image of a batch to an area of any size, and resizes all crops to the same size.

The interpolation is bilinear with antialiasing, as in Pillow and in torch's `interpolate(..., antialias=True)`: along
each axis, the weights of the old pixels form a triangle around the new pixel. If the crop is shrunk, the triangle is
wider. The result for an image does not depend on the rest of its batch, so it is bit-identical for any number of
processes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHT_UNITS = 2048  # weights are multiples of 1 / WEIGHT_UNITS, which fit the 11 significant bits of TF32
ROW_UNITS = 8  # the first of two matrix products is rounded to multiples of 1 / ROW_UNITS, which fit TF32, too
KERNEL_UNITS = 2**14  # triangle values are multiples of 1 / KERNEL_UNITS; in float32, sums up to 1024 are exact


def batch_resized_crop(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, *, size: tuple[int, int]
) -> Tensor:
    """(N, C, H, W) uint8 -> (N, C, *size) uint8, channels_last: a crop of each image, resized.

    `top`, `left`, `height`, `width`: (N,) int64, the crops in pixels, which must lie inside the images. Results differ
    by at most 1 from those of torchvision's `resized_crop` in float. Does not wait for the device.
    """
    resize = resize_one_by_one if images.device.type == "cpu" else resize_by_products
    return resize(images, top, left, height, width, size=size)


def resize_one_by_one(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, *, size: tuple[int, int]
) -> Tensor:
    """`batch_resized_crop` for the CPU, where torch's uint8 kernel is ten times as fast as matrix products."""
    count, channels = images.shape[:2]
    resized = torch.empty((count, *size, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    places = torch.stack((top, top + height, left, left + width), dim=1).tolist()
    for i, (first_row, end_row, first_column, end_column) in enumerate(places):
        crop = images[i : i + 1, :, first_row:end_row, first_column:end_column]
        resized[i] = F.interpolate(crop, size, mode="bilinear", antialias=True)[0]
    return resized


def resize_by_products(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, *, size: tuple[int, int]
) -> Tensor:
    """`batch_resized_crop` for a GPU, as two matrix products for the whole batch.

    All weights are multiples of 1/2048 that add up to 1, and the first product is rounded to multiples of 1/8. All
    factors then fit TF32, and all partial sums fit float32. The sums are therefore exact, whatever the order of
    summation, which depends on the size of the batch.
    """
    count, channels, old_height, old_width = images.shape
    new_height, new_width = size
    by_row = _weights(top, height, old=old_height, new=new_height)  # (N, new_height, H)
    by_column = _weights(left, width, old=old_width, new=new_width)  # (N, new_width, W)
    pixels = images.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)  # (N, H, C, W)
    rows = torch.bmm(by_row, pixels.flatten(2)).mul_(ROW_UNITS / WEIGHT_UNITS).round_()
    rows = rows.view(count, new_height * channels, old_width)
    resized = torch.bmm(rows, by_column.transpose(1, 2)).mul_(1 / (ROW_UNITS * WEIGHT_UNITS)).round_()
    resized = resized.view(count, new_height, channels, new_width).transpose(2, 3)  # (N, new_height, new_width, C)
    return resized.to(torch.uint8, memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def sides_of_areas(
    shares: Tensor, positions: Tensor, *, size: tuple[int, int], ratios: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Heights and widths of crops, (N,) int64. `size` is the height and width of the images before the crop.

    `shares` (N,) are the areas of the crops, divided by the area of an image. `positions` (N,), 0 to 1, choose the
    aspect ratio (width / height) on a logarithmic scale between the two `ratios`. Such crops are from Szegedy et al.,
    arXiv 1409.4842. If a large area fits into the image only with some of the ratios, one of these is chosen. If it
    fits with none of them, the crop is smaller. torchvision's RandomResizedCrop draws another area if a crop does not
    fit, so its areas are smaller on average.
    """
    # The last bits of log(x) and exp(x) may depend on where x is in the tensor. In float64, this difference is too
    # small to change the sides, which are rounded to whole pixels.
    shares, positions = shares.double(), positions.double()
    square, room, limits = math.log(size[1] / size[0]), -shares.log(), [math.log(ratio) for ratio in ratios]
    low, high = (square - room).clamp(*limits), (square + room).clamp(*limits)
    stretch = (torch.lerp(low, high, positions) / 2).exp()
    side = (shares * (size[0] * size[1])).sqrt()
    if not limits[0] <= square <= limits[1]:  # otherwise, every area fits with the ratio of the image
        side = torch.minimum(side, torch.minimum(size[0] * stretch, size[1] / stretch))
    height, width = (side / stretch).round().long(), (side * stretch).round().long()
    return height.clamp(1, size[0]), width.clamp(1, size[1])


def _weights(start: Tensor, length: Tensor, *, old: int, new: int) -> Tensor:
    """(N, new, old) float32: the weight of each old pixel for each new one, in units of 1 / WEIGHT_UNITS.

    `start` and `length` (N,): the range of old pixels to resize; pixels outside it have weight 0. The cumulative sums
    are rounded instead of the weights, so that the rounded weights of every new pixel add up to 1.
    """
    scale = (length / new)[:, None]
    center = scale * (torch.arange(new, device=start.device) + 0.5)  # (N, new), in pixels from `start`
    position = torch.arange(old, device=start.device) - start[:, None] + 0.5  # (N, old)
    inside = (position > 0) & (position < length[:, None])
    distance = (position[:, None, :] - center[:, :, None]).abs_().div_(scale.clamp(min=1)[:, :, None])
    kernel = (1 - distance).clamp_(min=0).mul_(KERNEL_UNITS).round_().mul_(inside[:, None, :])
    cumulative = kernel.int().cumsum(dim=2, dtype=torch.int32)  # torch has no deterministic cumsum of floats on CUDA
    rounded = (cumulative * (WEIGHT_UNITS / cumulative[:, :, -1:])).round_()
    return F.pad(rounded, (1, 0)).diff(dim=2)
