"""A small folder of photographs in two classes, for tests of `--source folder`."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.errors import InputError
from data_prep.sources.folder import load_folder


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def draw_photos(root: Path) -> Path:
    """Writes twelve training and four test images of two classes; the red value encodes class and number."""
    for split, count in (("train", 6), ("test", 2)):
        for label, kind in enumerate(("cat", "dog")):
            for number in range(count):
                color = (100 * label + 10 * number, count, 0)
                save(root / split / kind / f"{number}.png", Image.new("RGB", (8, 8), color))
    return root


def fails(root: Path, **options: Any) -> str:
    """Returns the message, one line, of the InputError that `load_folder` must raise for `root`."""
    with pytest.raises(InputError) as caught:
        load_folder(root, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)
