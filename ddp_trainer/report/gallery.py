"""Pictures of the most confident mistakes: thumbnails for the page, and one sheet of them as a file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddp_trainer.report.figures import INK, new_figure
from ddp_trainer.tracking.predictions import Mistake

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

MAX_SIDE = 208  # pixels: about twice the width at which the page shows an image
SHEET_COLUMNS = 8


def thumbnail(pixels: np.ndarray) -> Image:
    """The (H, W, 3) uint8 image, shrunk to MAX_SIDE pixels a side if it is larger."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


def image_url(pixels: np.ndarray) -> str:
    """Data URL of the thumbnail. A large image becomes a JPEG, so that the page stays small."""
    image, target = thumbnail(pixels), io.BytesIO()
    if max(image.size) < MAX_SIDE:
        image.save(target, format="PNG")
        return data_url(target.getvalue())
    image.save(target, format="JPEG", quality=88)
    return data_url(target.getvalue(), kind="jpeg")


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def mistakes_figure(mistakes: Sequence[Mistake], labels: Mapping[str, str]) -> Figure:
    """A sheet of the misclassified images, captioned with true class, predicted class and its probability.

    If there are no mistakes, the sheet says so. `labels`: a short label for each class.
    """
    columns = min(SHEET_COLUMNS, max(len(mistakes), 2))
    rows = max(-(-len(mistakes) // columns), 1)
    width, height = 1.35, 1.85  # inches per image; all images share one Axes, because an Axes for each would be slow
    figure = new_figure(width * columns, height * rows)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for place, mistake in enumerate(mistakes):
        row, column = divmod(place, columns)
        left, top = column * width + 0.1, row * height + 0.62
        image = np.asarray(thumbnail(mistake.pixels))
        axes.imshow(image, extent=(left, left + 1.15, top + 1.15, top), interpolation="nearest")
        caption = f"{labels[mistake.true]}\nas {labels[mistake.predicted]}\n{mistake.probability:.1%}"
        axes.text(left, top - 0.05, caption, fontsize=8, color=INK, linespacing=1.25)
    if not mistakes:
        text = "No image was\nmisclassified."
        axes.text(width * columns / 2, height / 2, text, ha="center", va="center", fontsize=11, color=INK)
    axes.set(xlim=(0, width * columns), ylim=(height * rows, 0), aspect="auto")
    return figure
