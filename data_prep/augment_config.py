"""Settings of the augmentation. Unlike the code that applies them, this module does not import torch."""

import math
from dataclasses import dataclass
from typing import Literal

from data_prep.errors import require


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    crop: Literal["padded", "random-resized"] = "padded"
    """padded: pad each image by --crop-padding, then crop it at a random position; random-resized: crop a random area
    of each image and resize it, as is common for photographs."""
    crop_padding: int = 4
    """For --crop padded: number of reflected pixels added on every side; 0: no padding."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """For --crop random-resized: smallest and largest area of the crop, as a share of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """For --crop random-resized: smallest and largest width of the crop, as a multiple of its height."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Flip images left to right. random: each with probability 1/2; alternating: each in every other epoch."""
    cutout: int = 0
    """Side in pixels of a square that is blanked out at a random place in each image; 0: none."""
    brightness: float = 0.0
    """Shift the values of each image by up to this many standard deviations."""
    contrast: float = 0.0
    """Scale the difference between an image and the mean color of the dataset by a random factor between 1 - x and
    1 + x, where x is this value."""
    mixup: float = 0.0
    """Blend pairs of images with a weight drawn from Beta(x, x), where x is this value; 0: off."""
    cutmix: float = 0.0
    """Swap a rectangle between the two images of each pair. Its share of the image, before it is clipped at the
    borders, is drawn from Beta(x, x), where x is this value; 0: off."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout", "brightness", "contrast", "mixup", "cutmix"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--{name.replace('_', '-')} must be 0 or more, got {value}")
        smallest, largest = self.crop_scale
        require(
            0 < smallest <= largest <= 1,
            f"--crop-scale must be two shares in (0, 1], the smaller one first, got {smallest} {largest}",
        )
        narrow, wide = self.crop_ratio
        require(
            0 < narrow <= wide < math.inf,
            f"--crop-ratio must be two positive numbers, the smaller one first, got {narrow} {wide}",
        )
        require(not (self.mixup and self.cutmix), "--mixup and --cutmix cannot be combined; use one of them")

    @property
    def mixes_pairs(self) -> bool:
        return bool(self.mixup or self.cutmix)
