"""Draws curves over epochs, and the reliability diagram.

`figures` sets the style and makes SVG and PNG; `confusion` and `gallery` draw the confusion matrix and the mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddp_trainer.report.figures import INK, LINE, MUTED, SERIES, Look, look_of, new_figure, style
from ddp_trainer.report.labels import drawable_labels
from ddp_trainer.report.scores import NUM_BINS, Calibration
from ddp_trainer.tracking.run_record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 500  # per curve; a chart is not much wider than this many pixels

Panel = Callable[["Axes", Sequence[Run]], None]


def thin_out(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve with at most MAX_POINTS points: each is the mean of a group of neighboring points."""
    size = -(-len(x) // MAX_POINTS)
    if size <= 1:
        return x, y
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def curves(title: str, names: Sequence[str], *, scale: float = 1.0, unit: str = "", from_zero: bool = False) -> Panel:
    """A function that draws a panel: for each run, one curve of each value in `names` (keys of metrics.jsonl).

    With one run, each value has its own color, and pale curves show the records of steps.jsonl. With several runs, each
    run has its own color and marker, and training curves are dashed. The panel then has no legend, because it has no
    room for one.
    """

    def draw(axes: Axes, runs: Sequence[Run]) -> None:
        style(axes, title=title, x="epoch", y=unit)
        several = len(runs) > 1
        for number, run in enumerate(runs):
            for place, name in enumerate(names):
                look = look_of(number if several else place)
                if not several:
                    _draw_steps(axes, run, name, scale, SERIES[look.color])
                _draw_epochs(axes, run, name, scale, look, dashed=several and name.startswith("train"))
        _finish_axes(axes, runs, from_zero=from_zero, legend=len(names) > 1 and not several)

    return draw


def has_steps(run: Run) -> bool:
    """Whether steps.jsonl has enough records for a curve: at least two per epoch."""
    return len(run.step_series("train_loss")[0]) >= 2 * len(run.metrics) > 0


def _draw_steps(axes: Axes, run: Run, name: str, scale: float, color: str) -> None:
    """Draws the records of steps.jsonl, if there are enough of them."""
    if not has_steps(run):
        return
    x, values = thin_out(*run.step_series(name))
    (line,) = axes.plot(x, values * scale, color=color, linewidth=1.2, alpha=0.4)
    line.set_in_layout(False)


def _draw_epochs(axes: Axes, run: Run, name: str, scale: float, look: Look, *, dashed: bool) -> None:
    epochs, values = thin_out(*run.series(name))
    has_dots = len(epochs) < 3
    (line,) = axes.plot(
        epochs,
        values * scale,
        color=SERIES[look.color],
        label="training" if name.startswith("train") else run.split,
        linewidth=1.1 if dashed else 1.8,
        linestyle="--" if dashed else "-",
        marker=look.marker or ("o" if has_dots else ""),
        markersize=4,
        markevery=-(-len(epochs) // 8) or None,  # no curve has more than eight markers
        clip_on=not has_dots,  # so that a dot on the edge of the axes is not cut in half
    )
    line.set_in_layout(False)


def _finish_axes(axes: Axes, runs: Sequence[Run], *, from_zero: bool, legend: bool) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    last_epoch = max((run.metrics[-1]["epoch"] for run in runs if run.metrics), default=0)
    if not last_epoch:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no epoch is finished", transform=axes.transAxes, ha="center", color=MUTED)
        return
    if last_epoch == 1:
        axes.set(xlim=(0, 2), xticks=[1])
    if from_zero:
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)
    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


PANELS: dict[str, Panel] = {
    "Accuracy": curves("Accuracy", ["train_accuracy", "test_accuracy"], scale=100, unit="%"),
    "Loss": curves("Loss", ["train_loss", "test_loss"], unit="cross-entropy"),
    "Learning rate": curves("Learning rate", ["learning_rate"], from_zero=True),
    "Throughput": curves("Throughput", ["images_per_second"], unit="images per second", from_zero=True),
}


def panel_figure(name: str, runs: Sequence[Run]) -> Figure:
    """One of PANELS, in a size that is readable on a phone."""
    figure = new_figure(4.8, 2.55)
    PANELS[name](figure.add_subplot(), runs)
    return figure


def curves_figure(runs: Sequence[Run]) -> Figure:
    """All panels in one figure."""
    figure = new_figure(11, 7)
    figure.set_layout_engine("constrained", hspace=0.06, wspace=0.04)
    for place, draw in enumerate(PANELS.values(), 1):
        draw(figure.add_subplot(2, 2, place), runs)
    if len(runs) > 1:
        _name_runs(figure, runs)
    return figure


def _name_runs(figure: Figure, runs: Sequence[Run]) -> None:
    """Adds a legend of the runs below the panels."""
    from matplotlib.lines import Line2D

    labels = drawable_labels([run.name for run in runs], 24, "run")
    lines = [
        Line2D([], [], color=SERIES[look.color], marker=look.marker, markersize=4, linewidth=1.8, label=label)
        for look, label in zip(map(look_of, range(len(runs))), labels, strict=True)
    ]
    lines.append(Line2D([], [], color=MUTED, linewidth=1.1, linestyle="--", label="training"))
    figure.legend(handles=lines, loc="outside lower center", ncols=5, frameon=False, fontsize=8, labelcolor=INK)


def reliability_figure(found: Calibration) -> Figure:
    figure = new_figure(4.6, 5.2)
    upper, lower = figure.subplots(2, 1, gridspec_kw={"height_ratios": [1, 4.4]})
    _draw_counts(upper, found)
    _draw_reliability(lower, found)
    return figure


def _draw_reliability(axes: Axes, found: Calibration) -> None:
    """Draws the share of correct predictions: one bar for each range of probabilities that has images."""
    width = 1 / NUM_BINS
    middles = (np.arange(NUM_BINS) + 0.5) * width
    filled = found.counts > 0
    style(axes, title="Reliability", x="probability of the predicted class", y="share of correct predictions")
    axes.bar(middles[filled], found.accuracy[filled], width=width * 0.92, color=SERIES[0])
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _draw_counts(axes: Axes, found: Calibration) -> None:
    """Draws the number of images in each range of probabilities, on a logarithmic scale."""
    from matplotlib.ticker import NullLocator

    width = 1 / NUM_BINS
    style(axes, title="Images", x="")
    axes.bar((np.arange(NUM_BINS) + 0.5) * width, found.counts, width=width * 0.92, color=MUTED)
    axes.set_yscale("symlog", linthresh=1)
    decades = [10**power for power in range(0, 8, 2) if 10**power <= max(found.counts.max(), 1)]
    axes.set_yticks([0, *decades], labels=[f"{count:,}" for count in (0, *decades)])
    axes.set(xlim=(0, 1), xticks=[])
    axes.yaxis.set_minor_locator(NullLocator())
