"""Augmentation on the device: pure `batch_*` functions over whole batches, and `Augmenter`, which draws for them.

Nothing here loops over images or waits for the device. What happens to an image depends on (seed, epoch, sample)
alone, so it is the same at every rank, batch and world size.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError
from data_prep.random_bits import below, random_bits, uniform


class ImageBatch(Protocol):
    """What `Augmenter` takes: `loader.Batch`, or anything like it."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def indices(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    crop_padding: int = 4
    """Crop each image at a random place out of itself with this many pixels of padding around; 0: no crop."""
    padding_mode: Literal["reflect", "zero"] = "reflect"
    """What the padding is made of."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror images left to right: at random, or every other epoch from a random start."""
    cutout: int = 0
    """Blank a square of this side at a random place; 0: none."""
    brightness: float = 0.0
    """Shift each image by up to this much, in standard deviations."""
    contrast: float = 0.0
    """Stretch each image's distance from the mean colour by up to this share."""
    mixup: float = 0.0
    """Blend pairs of images with a weight from Beta(x, x); 0: none."""
    cutmix: float = 0.0
    """Exchange a rectangle between pairs of images, its size from Beta(x, x); 0: none."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout", "brightness", "contrast", "mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value}: give 0 or more")
        if self.mixup and self.cutmix:
            raise InputError("--mixup and --cutmix: choose one of them")

    @property
    def mixes_pairs(self) -> bool:
        return bool(self.mixup or self.cutmix)


class Augmented(NamedTuple):
    """A batch as the network sees it."""

    images: Tensor  # (N, 3, H, W) normalised, channels_last
    labels: Tensor  # (N,) int64
    partner_labels: Tensor | None  # (N,) int64, of the image mixed in
    label_weights: Tensor | None  # (N,) share of `labels`; the rest belongs to `partner_labels`


def _rows(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W * C): whole image rows side by side in memory; a view of a channels_last batch.

    Kernels run along the last dimension; over three colours at a time they would be several times slower on a CPU.
    """
    return images.permute(0, 2, 3, 1).flatten(2)


def _images(rows: Tensor, channels: int) -> Tensor:
    """The inverse of `_rows`, as a view."""
    return rows.unflatten(2, (-1, channels)).permute(0, 3, 1, 2)


def batch_crop(images: Tensor, top: Tensor, left: Tensor, *, padding: int, mode: Literal["reflect", "zero"]) -> Tensor:
    """(N, C, H, W) -> the same size, each image cut out of its padded self at (top, left), (N,) from 0 to 2 padding.

    The padded images are viewed as all their windows and one window is picked for each: the copy runs along whole rows.
    """
    padded = _pad(images.permute(0, 2, 3, 1), padding, mode)  # (N, H + 2p, W + 2p, C) contiguous
    count, channels, height, width = images.shape
    by_image, by_row, by_column, _ = padded.stride()
    windows = padded.as_strided(
        (count, 2 * padding + 1, 2 * padding + 1, height, width * channels),
        (by_image, by_row, by_column, by_row, 1),
    )
    return _images(windows[torch.arange(count, device=images.device), top, left], channels)


def _pad(images: Tensor, padding: int, mode: str) -> Tensor:
    """(N, H, W, C) padded on all four sides; reflection does not repeat the edge."""
    if mode == "zero":
        return torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding)).contiguous()
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
    channels, width = images.shape[1], images.shape[3]
    scale = torch.tensor([1 / (255 * deviation) for deviation in std], dtype=dtype, device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=dtype, device=images.device)
    rows = _rows(images).to(dtype)
    return _images(rows.mul_(scale.repeat(width)).add_(shift.repeat(width)), channels)


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
    cumulative = np.cumsum((np.sin(angle) * np.cos(angle)) ** (2 * alpha - 1))
    return np.interp(np.linspace(0, 1, count), cumulative / cumulative[-1], np.sin(angle) ** 2)


class Augmenter:
    """Draws for each image by its sample index and applies what the configuration asks for."""

    NUM_DRAWS = 11

    def __init__(
        self,
        config: AugmentConfig,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.mean, self.std, self.seed, self.dtype = config, mean, std, seed, dtype
        alpha = config.mixup or config.cutmix
        self._quantiles = torch.from_numpy(beta_quantiles(alpha)).float() if alpha else None

    def __call__(self, batch: ImageBatch, *, epoch: int) -> Augmented:
        """uint8 images of `epoch` (from 0) -> what the network trains on."""
        config, images = self.config, batch.images
        draws = random_bits(batch.indices, seed=self.seed, epoch=epoch, num_draws=self.NUM_DRAWS)
        if config.crop_padding:
            places = 2 * config.crop_padding + 1
            images = batch_crop(images, below(draws[0], places), below(draws[1], places),
                                padding=config.crop_padding, mode=config.padding_mode)  # fmt: skip
        if config.flip != "none":
            images = batch_flip(images, self._flipped(batch.indices, draws[2], epoch))
        images = batch_normalise(images, self.mean, self.std, self.dtype)
        if config.cutout:
            side, (height, width) = config.cutout, images.shape[2:]
            top, left = below(draws[3], max(height - side, 0) + 1), below(draws[4], max(width - side, 0) + 1)
            images = batch_cutout(images, top, left, side=side)
        if config.brightness or config.contrast:
            shift, stretch = (2 * uniform(draws[row]) - 1 for row in (5, 6))
            shift, stretch = shift * config.brightness, 1 + stretch * config.contrast
            images = batch_jitter(images, shift.to(self.dtype), stretch.to(self.dtype))
        if not config.mixes_pairs:
            return Augmented(images, batch.labels, None, None)
        images, weights = self._mix(images, batch.indices, epoch)
        return Augmented(images, batch.labels, batch_partners(batch.labels), weights)

    def _flipped(self, indices: Tensor, bits: Tensor, epoch: int) -> Tensor:
        """(N,) bool. Alternating: a random half in epoch 0, the other half in the next epoch, and so on (airbench94,
        github.com/KellerJordan/cifar10-airbench)."""
        if self.config.flip == "random":
            return bits < 0
        start = random_bits(indices, seed=self.seed, epoch=-1, num_draws=1)[0] < 0
        return start ^ (epoch % 2 == 1)

    def _mix(self, images: Tensor, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Mixed images and (N,) weights of their own labels, both drawn for the pair by its smaller sample index."""
        if len(indices) % 2:
            raise InputError("--mixup and --cutmix pair images: give each process an even share of --batch-size")
        pair = torch.minimum(indices, batch_partners(indices))
        bits = random_bits(pair, seed=self.seed, epoch=epoch, num_draws=self.NUM_DRAWS)[7:]
        weights = self._beta(uniform(bits[0]))
        if self.config.mixup:
            return batch_mixup(images, weights), weights
        height, width = images.shape[2:]
        share = (1 - weights).sqrt()
        box_height, box_width = (share * height).round().long(), (share * width).round().long()
        top = below(bits[1], height) - box_height // 2
        left = below(bits[2], width) - box_width // 2
        return batch_cutmix(images, top, left, box_height, box_width)

    def _beta(self, uniforms: Tensor) -> Tensor:
        """(N,) uniform -> Beta(alpha, alpha), by its table of quantiles."""
        assert self._quantiles is not None
        table = self._quantiles = self._quantiles.to(uniforms.device)
        place = uniforms * (len(table) - 1)
        index = place.long()
        return torch.lerp(table[index], table[index + 1], place - index)
