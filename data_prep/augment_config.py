"""The settings of the augmentation, apart from what carries them out: they are read before torch is there."""

import math
from dataclasses import dataclass
from typing import Literal

from data_prep.errors import require


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    crop_padding: int = 4
    """Crop each image at a random place out of itself with this many pixels of padding around; 0: no padding."""
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
            require(0 <= value < math.inf, f"--{name.replace('_', '-')} {value}: give 0 or more")
        require(not (self.mixup and self.cutmix), "--mixup and --cutmix: choose one of them")

    @property
    def mixes_pairs(self) -> bool:
        return bool(self.mixup or self.cutmix)
