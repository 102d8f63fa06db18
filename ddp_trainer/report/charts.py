"""Curves and the reliability diagram, drawn on given axes in a given theme. No global state of matplotlib is touched.

Not owned here: which pictures go where (`pictures`), and pictures made of images or matrices (`matrices`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ddp_trainer.report.scores import NUM_BINS, Calibration
from ddp_trainer.tracking.run_record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one colour scheme; the page's style sheet has the same."""

    surface: str
    ink: str
    muted: str
    line: str
    series: tuple[str, ...]
    cells: tuple[str, str]  # of a matrix, from nothing to everything


THEMES = {
    "light": Theme(
        surface="#ffffff",
        ink="#22282e",
        muted="#616b75",
        line="#e3e5e8",
        cells=("#ffffff", "#1f5f8b"),
        series=(
            "#1f6f9f",
            "#c2573a",
            "#3d8062",
            "#8a5fa6",
            "#b08518",
            "#0f8b8d",
            "#b5467b",
            "#7a8a2a",
            "#7d5a44",
            "#5f6b76",
        ),
    ),
    "dark": Theme(
        surface="#1c2126",
        ink="#e4e6e8",
        muted="#a0a9b2",
        line="#333b43",
        cells=("#1c2126", "#78b8e0"),
        series=(
            "#78b8e0",
            "#ea9a7c",
            "#84c4a4",
            "#c3a1da",
            "#dcbb5f",
            "#6fd0d0",
            "#ea9cc2",
            "#c3d06a",
            "#c9a58d",
            "#aab3bb",
        ),
    ),
}

Panel = Callable[["Axes", Sequence[Run], Theme], None]


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """Inches. A figure that no global registry knows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor=theme.surface, layout="constrained")


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """Names in the figure are shown as they are: `$` starts no formula, and a letter the font lacks is no failure.

    Drawn once; `savefig` draws twice.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from PIL import Image

    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    target = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(target, format="PNG")
    return target.getvalue()


def shorten(name: str, length: int = 16) -> str:
    """One short line, for labels in pictures."""
    line = " ".join(name.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def style(axes: Axes, theme: Theme, *, title: str, x: str, y: str = "") -> None:
    axes.set_facecolor(theme.surface)
    axes.set_title(title, loc="left", color=theme.ink, fontsize=11, pad=8)
    axes.set_xlabel(x, color=theme.muted, fontsize=9)
    axes.set_ylabel(y, color=theme.muted, fontsize=9)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.line)


def curves(title: str, names: Sequence[str], *, scale: float = 1.0, unit: str = "", from_zero: bool = False) -> Panel:
    """A panel of figures of the record, for one run or several.

    One run: a colour for each figure, and a legend. Several: a colour for each run, training figures dashed, and no
    legend, for which a panel has no room.
    """

    def draw(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter

        style(axes, theme, title=title, x="epoch", y=unit)
        axes.grid(axis="y", color=theme.line, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        several = len(runs) > 1
        for number, run in enumerate(runs):
            for place, name in enumerate(names):
                epochs, values = run.series(name)
                is_training = name.startswith("train")
                dashed = several and is_training
                dots = len(epochs) < 3
                (line,) = axes.plot(
                    epochs,
                    values * scale,
                    color=theme.series[(number if several else place) % len(theme.series)],
                    label="training" if is_training else run.split,
                    linewidth=1.1 if dashed else 1.8,
                    linestyle="--" if dashed else "-",
                    marker="o" if dots else "",
                    markersize=4,
                    clip_on=not dots,  # a dot on the axis is to be seen whole
                )
                line.set_in_layout(False)
        last_epoch = max((run.metrics[-1]["epoch"] for run in runs if run.metrics), default=0)
        if not last_epoch:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no epoch was finished", transform=axes.transAxes, ha="center", color=theme.muted)
            return
        if last_epoch == 1:
            axes.set(xlim=(0, 2), xticks=[1])
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(names) > 1 and not several:
            axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink)

    return draw


PANELS: dict[str, Panel] = {
    "Loss": curves("Loss", ["train_loss", "test_loss"], unit="cross-entropy"),
    "Accuracy": curves("Accuracy", ["train_accuracy", "test_accuracy"], scale=100, unit="%"),
    "Learning rate": curves("Learning rate at the end of the epoch", ["learning_rate"], from_zero=True),
    "Throughput": curves("Throughput", ["images_per_second"], unit="images per second", from_zero=True),
}


def name_runs(figure: Figure, runs: Sequence[Run], theme: Theme) -> None:
    """A legend of several runs below all panels of a figure."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=theme.series[number % len(theme.series)], linewidth=1.8, label=shorten(run.name, 24))
        for number, run in enumerate(runs)
    ]
    lines.append(Line2D([], [], color=theme.muted, linewidth=1.1, linestyle="--", label="training"))
    figure.legend(handles=lines, loc="outside lower center", ncols=6, frameon=False, fontsize=8, labelcolor=theme.ink)


def draw_reliability(axes: Axes, found: Calibration, theme: Theme) -> None:
    """Bars: how often the class was right, for each range of the probability it was given."""
    width = 1 / NUM_BINS
    middles = (np.arange(NUM_BINS) + 0.5) * width
    filled = found.counts > 0
    style(axes, theme, title="Reliability", x="probability of the predicted class", y="share that was right")
    axes.bar(middles[filled], found.accuracy[filled], width=width * 0.92, color=theme.series[0])
    axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(0, 1))


def draw_confidences(axes: Axes, found: Calibration, theme: Theme) -> None:
    """How many images there are in each range, on a logarithmic scale."""
    from matplotlib.ticker import NullLocator

    width = 1 / NUM_BINS
    style(axes, theme, title="Images", x="")
    axes.bar((np.arange(NUM_BINS) + 0.5) * width, found.counts, width=width * 0.92, color=theme.muted)
    axes.set_yscale("symlog", linthresh=1)
    decades = [10**power for power in range(0, 8, 2) if 10**power <= max(found.counts.max(), 1)]
    axes.set_yticks([0, *decades], labels=[f"{count:,}" for count in (0, *decades)])
    axes.set(xlim=(0, 1), xticks=[])
    axes.yaxis.set_minor_locator(NullLocator())
