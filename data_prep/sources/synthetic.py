"""Ten classes of synthetic images, generated from a seed, for demos and tests.

Each class is a shape. The colors, position, size, tilt and background are random, so no single pixel says much about
the class, and a linear classifier is far less accurate than a network.
"""

from collections.abc import Callable

import numpy as np

from data_prep.errors import InputError
from data_prep.sources import ImageSet, Split, images_per_chunk

DEFAULT_TRAIN_COUNT = 3000
DEFAULT_TEST_COUNT = 1000
MAX_COUNT = 10**9
NOISE = 12.0  # standard deviation of the noise, on the scale 0-255
MIN_CONTRAST = 100.0  # distance between the colors of shape and background, in RGB units

Plane = np.ndarray  # (N, size, size) float32: a value at each pixel of each image


def _radius(u: Plane, v: Plane) -> Plane:
    return np.sqrt(u**2 + v**2)


def _box(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u), np.abs(v))


# Approximate distance from (u, v) to the edge of the shape, in units of half the shape's width; negative outside.
SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "bow tie": lambda u, v: np.minimum(0.85 - np.abs(v), 0.9 * np.abs(v) - np.abs(u) + 0.06),
    "checkerboard": lambda u, v: np.minimum(0.9 - _box(u, v), 0.25 * np.sin(3.5 * u) * np.sin(3.5 * v)),
    "crescent": lambda u, v: np.minimum(0.9 - _radius(u, v), _radius(u - 0.45, v) - 0.65),
    "cross": lambda u, v: np.minimum(0.28 - np.minimum(np.abs(u), np.abs(v)), 0.9 - _box(u, v)),
    "disc": lambda u, v: 0.8 - _radius(u, v),
    "ring": lambda u, v: 0.2 - np.abs(_radius(u, v) - 0.7),
    "square": lambda u, v: 0.75 - _box(u, v),
    "star": lambda u, v: 0.6 * (1 + 0.5 * np.cos(5 * np.arctan2(u, v))) - _radius(u, v),
    "stripes": lambda u, v: np.minimum(0.9 - _box(u, v), 0.12 * np.sin(9 * v)),
    "triangle": lambda u, v: 0.45 - np.maximum(-v, np.maximum(0.866 * u + 0.5 * v, 0.5 * v - 0.866 * u)),
}


def draw_synthetic(*, train_count: int, test_count: int, seed: int, size: int = 32) -> ImageSet:
    """`train_count` training images and `test_count` test images of `size` x `size` pixels.

    In each split, the numbers of images per class differ by at most one. The same arguments give the same pixels.
    Raises InputError for counts or sizes out of range.
    """
    if min(train_count, test_count) < len(SHAPES) or max(train_count, test_count) > MAX_COUNT:
        raise InputError(
            f"--train-count and --test-count must be from {len(SHAPES)} to {MAX_COUNT}, "
            f"got {train_count} and {test_count}"
        )
    if not 8 <= size <= 1024:
        raise InputError(f"--size must be 8 to 1024, got {size}")
    train, test = (np.random.default_rng((seed, part)) for part in (0, 1))
    return ImageSet(
        source="synthetic",
        classes=tuple(SHAPES),
        train=_draw_split(train, train_count, size),
        test=_draw_split(test, test_count, size),
    )


def _draw_split(random: np.random.Generator, count: int, size: int) -> Split:
    labels = random.permutation(np.arange(count) % len(SHAPES))
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for label, shape in enumerate(SHAPES.values()):
        _draw_shape(random, shape, images, np.flatnonzero(labels == label))
    return Split(images, labels.astype(np.int64))


def _draw_shape(
    random: np.random.Generator, shape: Callable[[Plane, Plane], Plane], images: np.ndarray, places: np.ndarray
) -> None:
    """Draws images of one shape into `images` at the positions `places`, a few at a time to save memory."""

    def uniform(low: float, high: float, *more: int) -> np.ndarray:
        return random.uniform(low, high, (len(places), 1, 1, *more)).astype(np.float32)

    size = images.shape[1]
    grid = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    y, x = np.meshgrid(grid, grid, indexing="ij")
    drawn = (
        *(uniform(0.55, 0.85), uniform(-0.4, 0.4)),  # half of the width, and the tilt
        *(uniform(-0.25, 0.25), uniform(-0.25, 0.25)),  # position
        *(uniform(0, 255, 3), uniform(0, 255, 3)),  # colors of the background and of the shape
        *(uniform(-1, 1), uniform(-1, 1)),  # direction of the shade
    )
    step = images_per_chunk(size**2 * 3)
    for start in range(0, len(places), step):
        piece = slice(start, start + step)
        half_width, tilt, left, top, background, color, across, down = (values[piece] for values in drawn)
        dx, dy = x - left, y - top
        u = (dx * np.cos(tilt) + dy * np.sin(tilt)) / half_width
        v = (dy * np.cos(tilt) - dx * np.sin(tilt)) / half_width
        cover = np.clip(shape(u, v) * half_width * size / 2 + 0.5, 0, 1)[..., None]  # antialiased edges
        too_near = np.linalg.norm(color - background, axis=-1, keepdims=True) < MIN_CONTRAST
        color = np.where(too_near, (background + 128) % 256, color)
        shade = 60 * (across * x + down * y)[..., None]
        grain = random.normal(0, NOISE, (*dx.shape, 3)).astype(np.float32)
        images[places[piece]] = np.clip(background * (1 - cover) + color * cover + shade + grain, 0, 255)
