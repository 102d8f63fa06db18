"""Augmentation on the device: what is done to each image, drawn by its sample index.

It depends on (seed, epoch, sample) alone, so it is the same at every rank, batch and world size. The operations
themselves are in `batch_ops`.
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
    batch_normalise,
    batch_partners,
    beta_quantiles,
)
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


class Augmented(NamedTuple):
    """A batch as the network sees it."""

    images: Tensor  # (N, 3, H, W) normalised, channels_last
    labels: Tensor  # (N,) int64
    partner_labels: Tensor | None  # (N,) int64, of the image mixed in
    label_weights: Tensor | None  # (N,) share of `labels`; the rest belongs to `partner_labels`


class Augmenter:
    """Draws for each image by its sample index and applies what the configuration asks for."""

    NUM_DRAWS = 10

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

    def __call__(self, batch: ImageBatch, *, epoch: int, side: int | None = None) -> Augmented:
        """uint8 images of `epoch` (from 0) -> what the network trains on: `side` x `side`; by default all of them."""
        config = self.config
        draws = random_bits(batch.indices, seed=self.seed, epoch=epoch, num_draws=self.NUM_DRAWS)
        images = self._crop(batch.images, draws, side)
        if config.flip != "none":
            images = batch_flip(images, self._flipped(batch.indices, draws[2], epoch))
        images = batch_normalise(images, self.mean, self.std, self.dtype)
        if config.cutout:
            height, width = images.shape[2:]
            top, left = below(draws[3], height - config.cutout + 1), below(draws[4], width - config.cutout + 1)
            images = batch_cutout(images, top, left, side=config.cutout)
        if config.brightness or config.contrast:
            shift, stretch = (2 * uniform(draws[row]) - 1 for row in (5, 6))
            shift, stretch = shift * config.brightness, 1 + stretch * config.contrast
            images = batch_jitter(images, shift.to(self.dtype), stretch.to(self.dtype))
        if not config.mixes_pairs:
            return Augmented(images, batch.labels, None, None)
        images, weights = self._mix(images, batch.indices, epoch)
        return Augmented(images, batch.labels, batch_partners(batch.labels), weights)

    def _crop(self, images: Tensor, draws: Tensor, side: int | None) -> Tensor:
        padding, (height, width) = self.config.crop_padding, images.shape[2:]
        size = (height, width) if side is None else (side, side)
        rows, columns = height + 2 * padding - size[0] + 1, width + 2 * padding - size[1] + 1  # to begin at
        if rows == columns == 1:
            return images
        return batch_crop(
            images,
            below(draws[0], rows),
            below(draws[1], columns),
            size=size,
            padding=padding,
            mode=self.config.padding_mode,
        )

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


def split(augmented: Augmented, parts: int) -> Iterator[Augmented]:
    """Equal consecutive pieces of one batch."""
    if parts == 1:
        yield augmented
        return
    columns = [[None] * parts if column is None else column.chunk(parts) for column in augmented]
    yield from (Augmented(*pieces) for pieces in zip(*columns, strict=True))
