"""Pure functions over whole batches of images: what augmentation is made of, with nothing drawn at random.

Nothing here loops over images or waits for the device.
"""

import functools
from typing import Literal

import numpy as np
import torch
from torch import Tensor


def _rows(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W * C): whole image rows side by side in memory; a view of a channels_last batch.

    Kernels run along the last dimension; over three colours at a time they would be several times slower on a CPU.
    """
    return images.permute(0, 2, 3, 1).flatten(2)


def _images(rows: Tensor, channels: int) -> Tensor:
    """The inverse of `_rows`, as a view."""
    return rows.unflatten(2, (-1, channels)).permute(0, 3, 1, 2)


def batch_crop(
    images: Tensor, top: Tensor, left: Tensor, *, size: tuple[int, int], padding: int, mode: Literal["reflect", "zero"]
) -> Tensor:
    """(N, C, H, W) -> (N, C, *size), each image cut out of its padded self at (top, left), (N,) each.

    The padded images are viewed as all their windows and one window is picked for each: the copy runs along whole rows.
    """
    padded = _pad(images.permute(0, 2, 3, 1), padding, mode).contiguous()  # (N, H + 2p, W + 2p, C)
    count, padded_height, padded_width, channels = padded.shape
    height, width = size
    by_image, by_row, by_column, _ = padded.stride()
    windows = padded.as_strided(
        (count, padded_height - height + 1, padded_width - width + 1, height, width * channels),
        (by_image, by_row, by_column, by_row, 1),
    )
    return _images(windows[torch.arange(count, device=images.device), top, left], channels)


def _pad(images: Tensor, padding: int, mode: str) -> Tensor:
    """(N, H, W, C) padded on all four sides; reflection does not repeat the edge."""
    if mode == "zero":
        return torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    for axis in (2, 1):
        size = images.shape[axis]
        before = images.narrow(axis, 1, padding).flip(axis)
        after = images.narrow(axis, size - 1 - padding, padding).flip(axis)
        images = torch.cat((before, images, after), dim=axis)
    return images


def batch_flip(images: Tensor, flipped: Tensor) -> Tensor:
    """(N, C, H, W), mirrored left to right where `flipped` (N,) bool."""
    rows = _words(_rows(images).contiguous())
    mirrored = _words(_rows(images.flip(3)).contiguous())
    chosen = torch.where(flipped[:, None, None], mirrored, rows)
    return _images(chosen.view(images.dtype), images.shape[1])


def _words(rows: Tensor) -> Tensor:
    """Rows of bytes as rows of the widest integers that fit: fewer elements for kernels that only move them."""
    length = rows.shape[-1]
    if rows.dtype != torch.uint8 or length % 4:
        return rows
    return rows.view(torch.int64 if length % 8 == 0 else torch.int32)


def _rectangle(
    size: tuple[int, int], top: Tensor, left: Tensor, height: Tensor, width: Tensor, channels: int
) -> Tensor:
    """(N, H, W * channels) bool: True within each image's rectangle, clipped at the borders. Places and sides (N,)."""
    rows = torch.arange(size[0], device=top.device)
    columns = torch.arange(size[1], device=top.device).repeat_interleave(channels)
    in_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :]


def batch_cutout(images: Tensor, top: Tensor, left: Tensor, *, side: int) -> Tensor:
    """(N, C, H, W) normalised: a square of `side` pixels at (top, left), (N,), becomes zero, the mean colour.

    DeVries & Taylor, arXiv 1708.04552; the square lies wholly within the image.
    """
    sides = torch.full_like(top, side)
    _, channels, height, width = images.shape
    blank = _rectangle((height, width), top, left, sides, sides, channels)
    return _images(_rows(images).masked_fill(blank, 0), channels)


def batch_normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) uint8 -> (value / 255 - mean) / std as `dtype`, channels_last."""
    scale, shift = _scale_and_shift(mean, std, images.shape[3], dtype, images.device)
    return _images(_rows(images).to(dtype).mul_(scale).add_(shift), images.shape[1])


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(W * C) each, for a row of pixels. Kept, because a copy from the host waits for all that the GPU has to do."""
    scale = torch.tensor([1 / (255 * deviation) for deviation in std], dtype=dtype, device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=dtype, device=device)
    return scale.repeat(width), shift.repeat(width)


def batch_jitter(images: Tensor, shift: Tensor, stretch: Tensor) -> Tensor:
    """(N, C, H, W) normalised, in place: stretch * image + shift, both (N,)."""
    return images.mul_(stretch[:, None, None, None]).add_(shift[:, None, None, None])


def batch_partners(column: Tensor) -> Tensor:
    """(N, ...), N even: each pair (2k, 2k + 1) exchanged."""
    return column.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def batch_mixup(images: Tensor, weights: Tensor) -> Tensor:
    """(N, C, H, W): `weights` (N,) of each image and the rest of its partner. Zhang et al., arXiv 1710.09412."""
    return torch.lerp(batch_partners(images), images, weights[:, None, None, None].to(images.dtype))


def batch_cutmix(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) with the partner's pixels within each rectangle, and (N,) the share of pixels that stay one's own.

    The rectangles, (N,) each, are clipped at the borders. Yun et al., arXiv 1905.04899.
    """
    _, channels, *size = images.shape
    exchanged = _rectangle((size[0], size[1]), top, left, height, width, channels)
    rows = _rows(images)
    mixed = torch.where(exchanged, batch_partners(rows), rows)
    return _images(mixed, channels), 1 - exchanged.float().mean(dim=(1, 2))


def beta_quantiles(alpha: float, count: int = 1025) -> np.ndarray:
    """(count,) evenly spaced quantiles of Beta(alpha, alpha).

    The density is integrated over the angle t of x = sin(t)^2, where it has no poles for alpha >= 1/2.
    """
    angle = (np.arange(200_000) + 0.5) * (np.pi / 2 / 200_000)
    cumulative = np.cumsum(np.sin(2 * angle) ** (2 * alpha - 1))  # up to a constant, and 1 at its peak
    return np.interp(np.linspace(0, 1, count), cumulative / cumulative[-1], np.sin(angle) ** 2)
