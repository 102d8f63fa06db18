"""The confusion matrix and the sheet of mistakes as pictures.

Not owned here: counting (`scores`) and themes (`charts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddp_trainer.report.charts import Theme, new_figure, shorten, style, to_png
from ddp_trainer.tracking.run_record import Mistake

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NUMBERED = 20  # with more classes the cells have no room for a number
SHEET_COLUMNS = 8


def confusion_png(confusion: np.ndarray, classes: tuple[str, ...], theme: Theme) -> bytes:
    """Colour: share of the true class, on a square-root scale, so that rare mistakes are seen too."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    num_classes = len(classes)
    numbered = num_classes <= MAX_NUMBERED
    labels, cell = 1.3, 0.36 if numbered else 0.125  # inches
    side = labels + 0.1 + max(2.2, cell * num_classes)
    figure = new_figure(side, side, theme)
    axes = figure.add_subplot()
    if not numbered:  # the layout engine is slow with hundreds of labels
        figure.set_layout_engine("none")
        axes.set_position((labels / side, labels / side, 1 - (labels + 0.1) / side, 1 - (labels + 0.1) / side))
    style(axes, theme, title="", x="predicted class", y="true class")
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    colours = LinearSegmentedColormap.from_list("cells", theme.cells)
    axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    size = 10 if num_classes <= 12 else 8
    names = [shorten(name) for name in classes]
    axes.set_xticks(range(num_classes), labels=names, rotation=90 if num_classes > 2 else 0, fontsize=size)
    axes.set_yticks(range(num_classes), labels=names, fontsize=size)
    axes.tick_params(length=0, labelcolor=theme.ink)
    for spine in axes.spines.values():
        spine.set_visible(False)
    lines = np.arange(num_classes + 1) - 0.5
    axes.hlines(lines, -0.5, num_classes - 0.5, color=theme.line, linewidth=0.4)
    axes.vlines(lines, -0.5, num_classes - 0.5, color=theme.line, linewidth=0.4)
    if numbered:
        _number_cells(axes, confusion, shares, theme)
    return to_png(figure, dpi=150)


def _number_cells(axes: Axes, confusion: np.ndarray, shares: np.ndarray, theme: Theme) -> None:
    longest = len(str(confusion.max()))
    size = min(9.5, 27 / longest)
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            colour = theme.surface if shares[row, column] > 0.25 else theme.ink
            axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=colour)


def misclassified_png(mistakes: Sequence[Mistake], theme: Theme) -> bytes:
    """The most confident mistakes, true class above predicted class; or a sheet that says that there are none."""
    columns = min(SHEET_COLUMNS, max(len(mistakes), 2))
    rows = max(-(-len(mistakes) // columns), 1)
    width, height = 1.35, 1.85  # inches; all in one pair of axes, as a pair for each picture is slow
    figure = new_figure(width * columns, height * rows, theme)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for place, mistake in enumerate(mistakes):
        row, column = divmod(place, columns)
        left, top = column * width + 0.1, row * height + 0.62
        axes.imshow(mistake.pixels, extent=(left, left + 1.15, top + 1.15, top), interpolation="nearest")
        said = f"{shorten(mistake.true, 14)}\nas {shorten(mistake.predicted, 14)}\n{mistake.probability:.1%}"
        axes.text(left, top - 0.05, said, fontsize=8, color=theme.ink, linespacing=1.25)
    if not mistakes:
        said = "No image was\nmisclassified."
        axes.text(width * columns / 2, height / 2, said, ha="center", va="center", fontsize=11, color=theme.ink)
    axes.set(xlim=(0, width * columns), ylim=(height * rows, 0), aspect="auto")
    return to_png(figure, dpi=110)
