"""Augmentation on the device: random numbers for each image, and the operations they control.

The random numbers of an image are a function of (seed, epoch, sample index), so they are the same on every rank, in
every batch and with any number of processes. The operations themselves are in `batch_ops`.
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
from data_prep.random_bits import below, random_bits, uniform
from data_prep.resized_crop import batch_resized_crop, sides_of_areas

NUM_DRAWS = 12
# The row of random bits that each decision uses. Append new rows, so that existing decisions keep their random bits.
CROP_TOP, CROP_LEFT, FLIP, CUTOUT_TOP, CUTOUT_LEFT, BRIGHTNESS, CONTRAST, MIX_WEIGHT, BOX_TOP, BOX_LEFT = range(10)
CROP_AREA, CROP_RATIO = 10, 11


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
        """Augments the uint8 images of a batch.

        `epoch` (0-based) is one number for the batch, or a tensor (N,) with one for each image. `side` is the side of
        the crops in pixels (default: the side of the images).
        """
        draws = self._draw(batch.indices, epoch)
        images = self._crop(batch.images, draws, side)
        images = self._flip(images, batch.indices, draws, epoch)
        images = batch_normalize(images, self.mean, self.std, self.dtype)
        images = self._cutout(images, draws)
        images = self._jitter(images, draws)
        if not self.config.mixes_pairs:
            return AugmentedBatch(images, batch.labels, None, None)
        images, weights = self._mix(images, batch.indices, epoch)
        return AugmentedBatch(images, batch.labels, batch_partners(batch.labels), weights)

    def _draw(self, indices: Tensor, epoch: int | Tensor) -> Tensor:
        """(NUM_DRAWS, N) int64 random bits."""
        return random_bits(indices, seed=self.seed, epoch=epoch, num_draws=NUM_DRAWS)

    def _crop(self, images: Tensor, draws: Tensor, side: int | None) -> Tensor:
        padding, (height, width) = self.config.crop_padding, images.shape[2:]
        size = (height, width) if side is None else (side, side)
        if self.config.crop == "random-resized":
            return self._random_resized_crop(images, draws, size)
        num_tops, num_lefts = height + 2 * padding - size[0] + 1, width + 2 * padding - size[1] + 1
        if num_tops == num_lefts == 1:
            return images
        top, left = below(draws[CROP_TOP], num_tops), below(draws[CROP_LEFT], num_lefts)
        return batch_crop(images, top, left, size=size, padding=padding)

    def _random_resized_crop(self, images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
        """Crops a random area of each image and resizes it to `size`."""
        (smallest, largest), whole = self.config.crop_scale, (images.size(2), images.size(3))
        shares = smallest + (largest - smallest) * uniform(draws[CROP_AREA])
        height, width = sides_of_areas(shares, uniform(draws[CROP_RATIO]), size=whole, ratios=self.config.crop_ratio)
        top, left = below(draws[CROP_TOP], whole[0] + 1 - height), below(draws[CROP_LEFT], whole[1] + 1 - width)
        return batch_resized_crop(images, top, left, height, width, size=size)

    def _flip(self, images: Tensor, indices: Tensor, draws: Tensor, epoch: int | Tensor) -> Tensor:
        """Mirrors images left to right. `random`: each with probability 1/2; `alternating`: a random half of them in
        even epochs, the other half in odd epochs (airbench94, github.com/KellerJordan/cifar10-airbench)."""
        if self.config.flip == "none":
            return images
        if self.config.flip == "random":
            return batch_flip(images, draws[FLIP] < 0)
        in_even_epochs = random_bits(indices, seed=self.seed, epoch=-1, num_draws=1)[0] < 0
        return batch_flip(images, in_even_epochs ^ (epoch % 2 == 1))

    def _cutout(self, images: Tensor, draws: Tensor) -> Tensor:
        side, (height, width) = self.config.cutout, images.shape[2:]
        if not side:
            return images
        top, left = below(draws[CUTOUT_TOP], height - side + 1), below(draws[CUTOUT_LEFT], width - side + 1)
        return batch_cutout(images, top, left, side=side)

    def _jitter(self, images: Tensor, draws: Tensor) -> Tensor:
        brightness, contrast = self.config.brightness, self.config.contrast
        if not (brightness or contrast):
            return images
        shift = (2 * uniform(draws[BRIGHTNESS]) - 1) * brightness
        stretch = 1 + (2 * uniform(draws[CONTRAST]) - 1) * contrast
        return batch_jitter(images, shift.to(self.dtype), stretch.to(self.dtype))

    def _mix(self, images: Tensor, indices: Tensor, epoch: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and the weights (N,) of their own labels. N must be even.

        Both images of a pair get the same weight and box: they use the random bits of the smaller of their two sample
        indices in the smaller of their two epochs.
        """
        if isinstance(epoch, Tensor) and epoch.dim():
            epoch = torch.minimum(epoch, batch_partners(epoch))
        draws = self._draw(torch.minimum(indices, batch_partners(indices)), epoch)
        weights = self._beta(uniform(draws[MIX_WEIGHT]))
        if self.config.mixup:
            return batch_mixup(images, weights), weights
        height, width = images.shape[2:]
        side_share = (1 - weights).sqrt()
        box_height, box_width = (side_share * height).round().long(), (side_share * width).round().long()
        top = below(draws[BOX_TOP], height) - box_height // 2
        left = below(draws[BOX_LEFT], width) - box_width // 2
        return batch_cutmix(images, top, left, box_height, box_width)

    def _beta(self, uniforms: Tensor) -> Tensor:
        """Uniform numbers (N,) -> numbers from Beta(alpha, alpha), by interpolation in a table of its quantiles."""
        assert self._quantiles is not None
        table = self._quantiles = self._quantiles.to(uniforms.device)
        position = uniforms * (len(table) - 1)
        index = position.long()
        return torch.lerp(table[index], table[index + 1], position - index)


def split_batch(batch: AugmentedBatch, parts: int) -> Iterator[AugmentedBatch]:
    """Yields `parts` consecutive parts of a batch, whose sizes differ by at most one image."""
    for part in range(parts):
        rows = share(len(batch.labels), part, parts)
        yield AugmentedBatch._make(None if column is None else column[rows] for column in batch)
