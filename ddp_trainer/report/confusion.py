"""The confusion matrix as a picture whose size is bounded, whatever the number of classes.

With more than MAX_LABELED classes, the picture has no labels. With more than MAX_SIDE classes, a row or column of
pixels can stand for several classes. `scores` counts the predictions.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddp_trainer.report.figures import CELL, INK, LINE, SURFACE, new_figure, style, to_png
from ddp_trainer.report.labels import drawable_labels
from ddp_trainer.report.scores import confusion_counts
from ddp_trainer.tracking.predictions import Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NUMBERED = 20  # with more classes, a cell has no room for a number
MAX_LABELED = 100  # with more classes, a row has no room for a label
MAX_SIDE = 2000  # pixels
STRONGEST = 0.7  # opacity of a cell that has all images of its class; the number in it must be readable


def confusion_png(found: Predictions, classes: Sequence[str]) -> bytes:
    """The content of confusion.png."""
    if len(classes) > MAX_LABELED:
        return cells_png(found, transparent=False)
    return to_png(confusion_figure(found, drawable_labels(classes)), dpi=150)


def confusion_figure(found: Predictions, labels: Sequence[str]) -> Figure:
    """The matrix with labels, for at most MAX_LABELED classes."""
    num_classes = len(labels)
    counts = confusion_counts(found.labels, found.predicted, num_classes)
    numbered = num_classes <= MAX_NUMBERED
    margin, cell = 1.3, 0.36 if numbered else 0.125  # inches
    side = margin + 0.1 + max(2.2, cell * num_classes)
    figure = new_figure(side, side)
    axes = figure.add_subplot()
    if not numbered:  # the layout engine is slow with many labels
        figure.set_layout_engine("none")
        axes.set_position((margin / side, margin / side, 1 - (margin + 0.1) / side, 1 - (margin + 0.1) / side))
    style(axes, title="", x="predicted class", y="true class")
    _draw_cells(axes, counts)
    _draw_labels(axes, labels)
    if numbered:
        _draw_numbers(axes, counts)
    return figure


def opacity(counts: np.ndarray) -> np.ndarray:
    """(C, C) in [0, 1]: square root of each cell's share of its row (true class), so that rare mistakes are visible."""
    return np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def _draw_cells(axes: Axes, counts: np.ndarray) -> None:
    """Draws the cells in one color of varying opacity, which suits light and dark backgrounds."""
    from matplotlib.colors import to_rgb

    cells = np.empty((*counts.shape, 4))
    cells[..., :3] = to_rgb(CELL)
    cells[..., 3] = STRONGEST * opacity(counts)
    axes.imshow(cells, interpolation="none")
    lines = np.arange(len(counts) + 1) - 0.5
    axes.hlines(lines, lines[0], lines[-1], color=LINE, linewidth=0.4)
    axes.vlines(lines, lines[0], lines[-1], color=LINE, linewidth=0.4)


def _draw_labels(axes: Axes, labels: Sequence[str]) -> None:
    size, places = 10 if len(labels) <= 12 else 8, range(len(labels))
    axes.set_xticks(places, labels=labels, rotation=90 if len(labels) > 2 else 0, fontsize=size)
    axes.set_yticks(places, labels=labels, fontsize=size)
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_numbers(axes: Axes, counts: np.ndarray) -> None:
    size = min(9.5, 27 / len(str(counts.max())))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=INK)


def cells_png(found: Predictions, *, transparent: bool) -> bytes:
    """PNG of the matrix without labels, at most MAX_SIDE pixels a side. With `transparent`, it suits any background."""
    from PIL import Image

    num_classes = found.probabilities.shape[1]
    blocks = min(num_classes, MAX_SIDE)
    counts = confusion_counts(found.labels * blocks // num_classes, found.predicted * blocks // num_classes, blocks)
    scale = MAX_SIDE // blocks
    pixels = np.rint(255 * opacity(counts)).astype(np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
    picture = Image.fromarray(pixels).convert("L")
    picture.putpalette(_palette(transparent=transparent))
    target = io.BytesIO()
    options = {"transparency": bytes(range(256))} if transparent else {}
    picture.save(target, format="PNG", **options)
    return target.getvalue()


def _palette(*, transparent: bool) -> bytes:
    """256 colors from the background to CELL. With `transparent`, all 256 are CELL, because only the opacity varies."""
    full, background = (np.frombuffer(bytes.fromhex(color[1:]), np.uint8).astype(float) for color in (CELL, SURFACE))
    shares = np.ones((256, 1)) if transparent else np.linspace(0, 1, 256)[:, None]
    return np.rint(background + shares * (full - background)).astype(np.uint8).tobytes()
