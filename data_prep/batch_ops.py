"""The operations that make up the augmentation, each on a whole batch of images.

They draw no random numbers, do not loop over images, and do not wait for the device.
"""

import functools

import numpy as np
import torch
from torch import Tensor


def _rows(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W * C), with contiguous rows of pixels. A view if the batch is channels_last.

    Kernels run along the last dimension. If it held only the three colors, they would be several times slower on a CPU.
    """
    return images.permute(0, 2, 3, 1).flatten(2)


def _images(rows: Tensor, channels: int) -> Tensor:
    """The inverse of `_rows`, as a view."""
    return rows.unflatten(2, (-1, channels)).permute(0, 3, 1, 2)


def batch_crop(images: Tensor, top: Tensor, left: Tensor, *, size: tuple[int, int], padding: int) -> Tensor:
    """(N, C, H, W) -> (N, C, *size): crops of the padded images, at the offsets `top` and `left` (N,).

    A strided view contains every possible crop of every padded image. Indexing selects one crop per image and copies
    whole rows at a time.
    """
    padded = _pad(images.permute(0, 2, 3, 1), padding).contiguous()  # (N, H + 2p, W + 2p, C)
    count, padded_height, padded_width, channels = padded.shape
    height, width = size
    by_image, by_row, by_column, _ = padded.stride()
    windows = padded.as_strided(
        (count, padded_height - height + 1, padded_width - width + 1, height, width * channels),
        (by_image, by_row, by_column, by_row, 1),
    )
    return _images(windows[torch.arange(count, device=images.device), top, left], channels)


def _pad(images: Tensor, padding: int) -> Tensor:
    """Pads images (N, H, W, C) by reflection on all four sides, without repeating the edge."""
    for axis in (2, 1):
        size = images.shape[axis]
        before = images.narrow(axis, 1, padding).flip(axis)
        after = images.narrow(axis, size - 1 - padding, padding).flip(axis)
        images = torch.cat((before, images, after), dim=axis)
    return images


def center_crop(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) -> (N, C, side, side), a view of the center. Offsets are rounded as in torchvision."""
    top, left = (round((length - side) / 2) for length in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def batch_flip(images: Tensor, flipped: Tensor) -> Tensor:
    """(N, C, H, W), mirrored left to right where `flipped` (N,) is True."""
    rows = _words(_rows(images).contiguous())
    mirrored = _words(_rows(images.flip(3)).contiguous())
    chosen = torch.where(flipped[:, None, None], mirrored, rows)
    return _images(chosen.view(images.dtype), images.shape[1])


def _words(rows: Tensor) -> Tensor:
    """Views rows of bytes as int64 or int32 if their length allows it, so that copying them moves fewer elements."""
    length = rows.shape[-1]
    if rows.dtype != torch.uint8 or length % 4:
        return rows
    return rows.view(torch.int64 if length % 8 == 0 else torch.int32)


def _rectangle(
    size: tuple[int, int], top: Tensor, left: Tensor, height: Tensor, width: Tensor, channels: int
) -> Tensor:
    """(N, H, W * channels) bool: True inside each image's rectangle, which is clipped at the borders.

    `size` is (H, W); `top`, `left`, `height` and `width` are (N,).
    """
    rows = torch.arange(size[0], device=top.device)
    columns = torch.arange(size[1], device=top.device).repeat_interleave(channels)
    in_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :]


def batch_cutout(images: Tensor, top: Tensor, left: Tensor, *, side: int) -> Tensor:
    """Sets a `side` x `side` square of each normalized image (N, C, H, W) to 0, the mean color. Returns the images.

    Images in channels_last format are changed in place. `top` and `left` (N,) are the corners of the squares. The
    method is from DeVries & Taylor, arXiv 1708.04552. In the paper, squares may extend beyond the image; those of
    `Augmenter` do not.
    """
    _, channels, height, width = images.shape
    in_rows = _windows(height, side, top.device)[top]
    in_columns = _windows(width, side, left.device, channels)[left]
    blank = in_rows[:, :, None] & in_columns[:, None, :]
    return _images(_rows(images).masked_fill_(blank, 0), channels)


@functools.cache
@torch.inference_mode(False)
def _windows(length: int, size: int, device: torch.device, repeats: int = 1) -> Tensor:
    """(length, length * repeats) bool: row k is True at positions k to k + size - 1.

    Each position has `repeats` columns. The result is cached, so that each step only takes rows from it. A captured
    CUDA graph can keep reading the same memory, because the cache never frees it.
    """
    offset = torch.arange(length) - torch.arange(length)[:, None]
    return ((offset >= 0) & (offset < size)).repeat_interleave(repeats, dim=1).to(device)


def batch_normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) uint8 -> (value / 255 - mean) / std as `dtype`, channels_last."""
    scale, shift = _scale_and_shift(mean, std, images.shape[3], dtype, images.device)
    return _images(_rows(images).to(dtype).mul_(scale).add_(shift), images.shape[1])


@functools.cache
@torch.inference_mode(False)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift for one row of pixels, (W * C,) each.

    They are cached, because a copy from the host would wait for the GPU's pending work.
    """
    scale = torch.tensor([1 / (255 * deviation) for deviation in std], dtype=dtype, device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=dtype, device=device)
    return scale.repeat(width), shift.repeat(width)


def batch_jitter(images: Tensor, shift: Tensor, stretch: Tensor) -> Tensor:
    """Replaces normalized images (N, C, H, W) in place by stretch * image + shift; `shift` and `stretch` are (N,)."""
    return images.mul_(stretch[:, None, None, None]).add_(shift[:, None, None, None])


def batch_partners(column: Tensor) -> Tensor:
    """`column` (N, ...) with rows 2k and 2k + 1 swapped. The images of these rows are partners. N must be even."""
    return column.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def batch_mixup(images: Tensor, weights: Tensor) -> Tensor:
    """weights * images + (1 - weights) * partners; `weights` is (N,). Zhang et al., arXiv 1710.09412."""
    return torch.lerp(batch_partners(images), images, weights[:, None, None, None].to(images.dtype))


def batch_cutmix(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) with their partners' pixels in a rectangle, and the share (N,) of pixels outside it.

    The rectangles, whose corners and sides are (N,), are clipped at the borders. Yun et al., arXiv 1905.04899.
    """
    _, channels, *size = images.shape
    swapped = _rectangle((size[0], size[1]), top, left, height, width, channels)
    rows = _rows(images)
    mixed = torch.where(swapped, batch_partners(rows), rows)
    return _images(mixed, channels), 1 - swapped.float().mean(dim=(1, 2))


def beta_quantiles(alpha: float, count: int = 1025) -> np.ndarray:
    """(count,) quantiles of Beta(alpha, alpha) for evenly spaced probabilities from 0 to 1.

    Let x be distributed as Beta(alpha, alpha). Its density is integrated over another variable, in which it has no
    poles. For alpha >= 1/2, this variable is the angle t with x = sin(t)^2. For a smaller alpha, it is u = x^alpha, for
    x from 0 to 1/2; the quantiles above 1/2 follow by symmetry.
    """
    alpha = float(np.clip(alpha, 1e-8, 1e8))  # if smaller, all weights would round to 0 or 1; if larger, to 1/2
    probabilities = np.linspace(0, 1, count)
    if alpha >= 0.5:
        angle = (np.arange(200_000) + 0.5) * (np.pi / 2 / 200_000)
        cumulative = np.cumsum(np.sin(2 * angle) ** (2 * alpha - 1))  # up to a constant factor; no summand exceeds 1
        return np.interp(probabilities, cumulative / cumulative[-1], np.sin(angle) ** 2)
    u = np.linspace(0, 0.5**alpha, 200_001)
    density = (1 - u ** (1 / alpha)) ** (alpha - 1)  # of u, up to a constant factor
    cumulative = np.concatenate(([0], np.cumsum(density[1:] + density[:-1])))
    lower = np.interp(np.minimum(probabilities, 1 - probabilities), cumulative / (2 * cumulative[-1]), u) ** (1 / alpha)
    return np.where(probabilities <= 0.5, lower, 1 - lower)
