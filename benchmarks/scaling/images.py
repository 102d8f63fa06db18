"""Writes a folder of JPEG files, with any number of images and classes and with images of any size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

Draw = Callable[[np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Shape:
    """A dataset: number of training images, number of classes, and side of the images in pixels.

    There is one test image for every ten training images, but at least one for each class.
    """

    images: int
    classes: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.images} images of {self.side} pixels in {self.classes} classes"

    def counts(self) -> dict[str, int]:
        """The number of images in each split."""
        return {"train": self.images, "test": max(self.images // 10, self.classes)}


def write_images(root: Path, shape: Shape, draw: Draw | None = None) -> None:
    """Writes ROOT/SPLIT/CLASS/NUMBER.jpg with quality 90. `draw` makes an image (default: smooth colors with noise)."""
    draw = draw or partial(_draw, side=shape.side)
    for seed, (split, count) in enumerate(shape.counts().items()):
        generator = np.random.default_rng(seed)
        folders = [root / split / f"class-{label:04d}" for label in range(shape.classes)]
        for folder in folders:
            folder.mkdir(parents=True)
        for number in range(count):
            path = folders[number % shape.classes] / f"{number:06d}.jpg"
            draw(generator).save(path, quality=90)


def _draw(generator: np.random.Generator, side: int) -> Image.Image:
    coarse = generator.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    fine = generator.integers(0, 256, size=(side, side, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    return Image.blend(smooth, Image.fromarray(fine), 0.1)
