"""Draws what each measured command costs, on logarithmic scales.

The upper charts show time, and the lower charts show peak memory. Each column varies one quantity.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.scaling.images import Shape
from benchmarks.scaling.measure import Cost

LABELS = {
    "images": "training images, 32 pixels",
    "large images": "training images, 256 pixels",
    "classes": "classes, 10,000 images of 32 pixels",
    "side": "side in pixels, 2,000 images",
}


def draw(measurements: Mapping[str, Mapping[Shape, Mapping[str, Cost]]], path: Path) -> None:
    """Saves the charts to `path`. `measurements`: for each quantity (a key of LABELS) and shape, {command: cost}."""
    figure = Figure(figsize=(4 * len(measurements), 6.4), layout="constrained")
    grid = figure.subplots(2, len(measurements), squeeze=False, sharex="col", sharey="row")
    for column, (axis, measured) in enumerate(measurements.items()):
        sizes = [{"classes": shape.classes, "side": shape.side}.get(axis, shape.images) for shape in measured]
        for row, kind in enumerate(Cost._fields):
            panel = grid[row, column]
            for command in next(iter(measured.values())):
                values = [getattr(costs[command], kind) for costs in measured.values()]
                panel.loglog(sizes, values, marker="o", markersize=3, label=command)
            panel.grid(visible=True, color="0.9")
        grid[1, column].set_xticks(sizes, [f"{size:,}" for size in sizes])
        grid[1, column].minorticks_off()
        grid[1, column].set_xlabel(LABELS[axis])
    grid[0, 0].set_ylabel("seconds")
    grid[1, 0].set_ylabel("peak memory in MB")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "scaling"}):
        figure.savefig(path, dpi=150)
