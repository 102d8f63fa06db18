"""Writes beton files (FFCV's format) from arrays, without dataset.json, and generates photograph-like images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.beton_writer import write_betons
from data_prep.encoding import RAW, Encoding
from data_prep.sources import Split
from data_prep.spool import open_spool


def write_splits(folder: Path, splits: Mapping[str, Split], encoding: Encoding = RAW, **options: Any) -> None:
    """Writes NAME.beton in `folder` for each split, as `write_dataset` does."""
    for name, split in splits.items():
        side, num_classes = split.images.shape[1], int(split.labels.max()) + 1
        with open_spool(folder, name, encoding.name, side=side, num_classes=num_classes) as spool:
            spool.add(split, [encoding.encode(image) for image in split.images])
    write_betons(folder, list(splits), **options)


def photographs(count: int, size: int, seed: int = 0) -> Split:
    """Returns smooth images with some grain. Their JPEG files are about as large as those of photographs."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (count, size // 16 + 1, size // 16 + 1, 3), dtype=np.uint8)
    smooth = [Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC) for each in small]
    grain = random.normal(0, 8, (count, size, size, 3))
    images = np.clip(np.stack([np.asarray(image) for image in smooth]) + grain, 0, 255).astype(np.uint8)
    return Split(images, random.integers(0, 3, count))
