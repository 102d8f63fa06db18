"""Augmentation on the device: random numbers for each image, and the operations they control.

The random numbers of an image are a function of (seed, epoch, sample index), so they are the same on every rank, in
every batch and with any number of processes. Exception: two images that are mixed with each other share the
numbers for mixing (see `draw`). The operations themselves are in `batch_ops` and `resized_crop`.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data_prep.augment_config import AugmentConfig
from data_prep.batch_ops import (
    batch_crop,
    batch_cutmix,
    batch_cutout,
    batch_flip,
    batch_jitter,
    batch_mixup,
    batch_normalize,
    batch_partners,
    beta_quantiles,
)
from data_prep.order import share
from data_prep.random_bits import HALF, below, coin, random_bits, uniform
from data_prep.resized_crop import batch_resized_crop, sides_of_areas

NUM_DRAWS = 12
# Each decision uses its own rows of the random bits from `Augmenter.draw`. A place takes two rows: one for the top edge
# and one for the left edge. Append the rows of a new decision, so that existing decisions keep their random bits.
CROP_PLACE, FLIP, CUTOUT_PLACE, BRIGHTNESS, CONTRAST, MIX_WEIGHT = slice(0, 2), 2, slice(3, 5), 5, 6, 7
BOX_PLACE, CROP_AREA, CROP_RATIO = slice(8, 10), 10, 11
MIX = slice(7, 10)  # MIX_WEIGHT and BOX_PLACE


class ImageBatch(Protocol):
    """What `Augmenter` takes: `loader.Batch`, or anything with the same three tensors."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def indices(self) -> Tensor: ...


class AugmentedBatch(NamedTuple):
    """A batch that is ready for the network."""

    images: Tensor  # (N, 3, H, W) normalized, channels_last
    labels: Tensor  # (N,) int64
    partner_labels: Tensor | None  # (N,) int64: labels of the images that were mixed in
    label_weights: Tensor | None  # (N,) weights of `labels`; those of `partner_labels` are 1 minus these


class Augmenter:
    """Turns uint8 batches into augmented and normalized batches, as configured by `config`."""

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

    def __call__(self, batch: ImageBatch, *, epoch: int | Tensor, side: int | None = None) -> AugmentedBatch:
        """Augments a batch with its random bits for `epoch`: see `augment` and `draw`."""
        return self.augment(batch, self.draw(batch.indices, epoch), side)

    def draw(self, indices: Tensor, epoch: int | Tensor) -> Tensor:
        """(..., NUM_DRAWS, N) int64 random bits for the images of one or more batches, whose indices are (..., N).

        `epoch` (0-based) is one number for all images, or a tensor (..., N) with one for each image.
        """
        draws = random_bits(indices, seed=self.seed, epoch=epoch, num_draws=NUM_DRAWS)
        if self.config.flip == "alternating":
            in_even_epochs = random_bits(indices, seed=self.seed, epoch=-1, num_draws=1)[..., 0, :]
            draws[..., FLIP, :] = in_even_epochs ^ (epoch % 2 * HALF)  # the opposite in odd epochs
        if self.config.mixes_pairs:
            # Both images of a pair get the same weight and box. Their random bits are those of the smaller sample
            # index and the smaller `epoch` of the two. (With `--balance batches`, `epoch` counts how often an image was
            # used before, so it can differ within a pair.)
            first = _smaller_of_pair(epoch) if isinstance(epoch, Tensor) and epoch.dim() else epoch
            bits = random_bits(_smaller_of_pair(indices), seed=self.seed, epoch=first, num_draws=NUM_DRAWS)
            draws[..., MIX, :] = bits[..., MIX, :]
        return draws

    def augment(self, batch: ImageBatch, draws: Tensor, side: int | None = None) -> AugmentedBatch:
        """Augments a batch of square uint8 images.

        `draws` (NUM_DRAWS, N) are the random bits from `draw`. `side` is the side of the crops in pixels (default: the
        side of the images).
        """
        images = self._crop(batch.images, draws, side)
        images = self._flip(images, draws)
        images = batch_normalize(images, self.mean, self.std, self.dtype)
        images = self._cutout(images, draws)
        images = self._jitter(images, draws)
        if not self.config.mixes_pairs:
            return AugmentedBatch(images, batch.labels, None, None)
        images, weights = self._mix(images, draws)
        return AugmentedBatch(images, batch.labels, batch_partners(batch.labels), weights)

    def _crop(self, images: Tensor, draws: Tensor, side: int | None) -> Tensor:
        padding, old = self.config.crop_padding, images.size(3)
        new = old if side is None else side
        if self.config.crop == "random-resized":
            return self._random_resized_crop(images, draws, (new, new))
        num_places = old + 2 * padding - new + 1  # along each axis
        if num_places == 1:
            return images
        top, left = below(draws[CROP_PLACE], num_places)
        return batch_crop(images, top, left, size=(new, new), padding=padding)

    def _random_resized_crop(self, images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
        """Crops a random area of each image and resizes it to `size`."""
        (smallest, largest), whole = self.config.crop_scale, (images.size(2), images.size(3))
        shares = smallest + (largest - smallest) * uniform(draws[CROP_AREA])
        height, width = sides_of_areas(shares, uniform(draws[CROP_RATIO]), size=whole, ratios=self.config.crop_ratio)
        bits = draws[CROP_PLACE]
        top, left = below(bits[0], whole[0] + 1 - height), below(bits[1], whole[1] + 1 - width)
        return batch_resized_crop(images, top, left, height, width, size=size)

    def _flip(self, images: Tensor, draws: Tensor) -> Tensor:
        """Mirrors images left to right. `random`: each with probability 1/2; `alternating`: a random half of them in
        even epochs, the other half in odd epochs (airbench94, github.com/KellerJordan/cifar10-airbench)."""
        return images if self.config.flip == "none" else batch_flip(images, coin(draws[FLIP]))

    def _cutout(self, images: Tensor, draws: Tensor) -> Tensor:
        side = self.config.cutout
        if not side:
            return images
        top, left = below(draws[CUTOUT_PLACE], images.size(3) - side + 1)
        return batch_cutout(images, top, left, side=side)

    def _jitter(self, images: Tensor, draws: Tensor) -> Tensor:
        brightness, contrast = self.config.brightness, self.config.contrast
        if not (brightness or contrast):
            return images
        shift = (2 * uniform(draws[BRIGHTNESS]) - 1) * brightness
        stretch = 1 + (2 * uniform(draws[CONTRAST]) - 1) * contrast
        return batch_jitter(images, shift.to(self.dtype), stretch.to(self.dtype))

    def _mix(self, images: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and the weights (N,) of their own labels. N must be even."""
        weights = self._beta(uniform(draws[MIX_WEIGHT]))
        if self.config.mixup:
            return batch_mixup(images, weights), weights
        side = images.size(3)
        box = ((1 - weights).sqrt() * side).round().long()
        top, left = below(draws[BOX_PLACE], side) - box // 2
        return batch_cutmix(images, top, left, box, box)

    def _beta(self, uniforms: Tensor) -> Tensor:
        """Uniform numbers (N,) -> numbers from Beta(alpha, alpha), by interpolation in a table of its quantiles."""
        assert self._quantiles is not None
        table = self._quantiles = self._quantiles.to(uniforms.device)
        position = uniforms * (len(table) - 1)
        index = position.long()
        return torch.lerp(table[index], table[index + 1], position - index)


def _smaller_of_pair(column: Tensor) -> Tensor:
    """`column` (..., N) with the values at 2k and 2k + 1 both replaced by the smaller one. N must be even."""
    return column.unflatten(-1, (-1, 2)).amin(dim=-1).repeat_interleave(2, dim=-1)


def split_batch(batch: AugmentedBatch, parts: int) -> Iterator[AugmentedBatch]:
    """Yields `parts` consecutive parts of a batch, whose sizes differ by at most one image."""
    for part in range(parts):
        rows = share(len(batch.labels), part, parts)
        yield AugmentedBatch._make(None if column is None else column[rows] for column in batch)
