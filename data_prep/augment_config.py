"""The settings of the augmentation, apart from what carries them out: they are read before torch is there."""

import math
from dataclasses import dataclass
from typing import Literal

from data_prep.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    crop_padding: int = 4
    """Crop each image at a random place out of itself with this many pixels of padding around; 0: no crop."""
    small_crop_epochs: int = 0
    """Train so many epochs at the beginning on crops: half of them of half the side, the others of three quarters."""
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
        for name in ("crop_padding", "small_crop_epochs", "cutout", "brightness", "contrast", "mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value}: give 0 or more")
        if self.mixup and self.cutmix:
            raise InputError("--mixup and --cutmix: choose one of them")

    def crop_side(self, side: int, *, epoch: int) -> int:
        """Of images of `side` pixels, what the network sees in `epoch` (from 0)."""
        if epoch >= self.small_crop_epochs:
            return side
        return side // 2 if epoch < self.small_crop_epochs // 2 else side * 3 // 4

    def crop_sides(self, side: int) -> list[int]:
        """All that `crop_side` gives for images of `side` pixels, from small to large."""
        first_of_each = (0, self.small_crop_epochs // 2, self.small_crop_epochs)
        return sorted({self.crop_side(side, epoch=epoch) for epoch in first_of_each})

    @property
    def mixes_pairs(self) -> bool:
        return bool(self.mixup or self.cutmix)
