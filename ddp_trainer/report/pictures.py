"""Which pictures there are: the files beside the page, and those inside it in both colour schemes."""

from collections.abc import Sequence

from ddp_trainer.report.charts import (
    PANELS,
    Theme,
    draw_confidences,
    draw_reliability,
    name_runs,
    new_figure,
    to_png,
)
from ddp_trainer.report.matrices import confusion_png, misclassified_png
from ddp_trainer.report.scores import Calibration, calibration, confusion_counts
from ddp_trainer.tracking.run_record import Run, list_mistakes


def draw_files(runs: Sequence[Run], theme: Theme) -> dict[str, bytes]:
    """File name -> PNG; without predictions the curves alone."""
    files = {"curves.png": curves_png(runs, theme)}
    first = runs[0]
    if first.predictions is not None:
        counts = confusion_counts(first.predictions.labels, first.predictions.predicted, len(first.classes))
        files["confusion.png"] = confusion_png(counts, first.classes, theme)
        files["reliability.png"] = reliability_png(
            calibration(first.predictions.labels, first.predictions.probabilities), theme
        )
        files["misclassified.png"] = misclassified_png(list_mistakes(first), theme)
    return files


def curves_png(runs: Sequence[Run], theme: Theme) -> bytes:
    """All panels on one sheet."""
    figure = new_figure(11, 7, theme)
    for place, draw in enumerate(PANELS.values(), 1):
        draw(figure.add_subplot(2, 2, place), runs, theme)
    if len(runs) > 1:
        name_runs(figure, runs, theme)
    return to_png(figure)


def panel_png(name: str, runs: Sequence[Run], theme: Theme) -> bytes:
    """One of PANELS, of a size that stays readable on a telephone."""
    figure = new_figure(4.3, 2.8, theme)
    PANELS[name](figure.add_subplot(), runs, theme)
    return to_png(figure, dpi=150)


def reliability_png(found: Calibration, theme: Theme) -> bytes:
    figure = new_figure(4.6, 5.2, theme)
    upper, lower = figure.subplots(2, 1, gridspec_kw={"height_ratios": [1, 4.4]})
    draw_confidences(upper, found, theme)
    draw_reliability(lower, found, theme)
    return to_png(figure)
