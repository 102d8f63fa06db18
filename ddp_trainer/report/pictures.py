"""Which pictures there are: the files beside the page, and those inside it in both colour schemes."""

from collections.abc import Sequence

from ddp_trainer.report.charts import PANELS, Theme, draw_confidences, draw_reliability, new_figure, to_png
from ddp_trainer.report.loading import Run, list_mistakes
from ddp_trainer.report.matrices import confusion_png, misclassified_png
from ddp_trainer.report.scores import Calibration, confusion_counts


def draw_files(runs: Sequence[Run], theme: Theme) -> dict[str, bytes]:
    """File name -> PNG; those of the confusion matrix and the mistakes only where there are predictions."""
    files = {"curves.png": curves_png(runs, theme)}
    first = runs[0]
    if first.predictions is not None:
        counts = confusion_counts(first.predictions.labels, first.predictions.predicted, len(first.classes))
        files["confusion.png"] = confusion_png(counts, first.classes, theme)
        mistakes = list_mistakes(first)
        if mistakes:
            files["misclassified.png"] = misclassified_png(mistakes, theme)
    return files


def curves_png(runs: Sequence[Run], theme: Theme) -> bytes:
    """All panels on one sheet."""
    figure = new_figure(11, 7, theme)
    for place, draw in enumerate(PANELS.values(), 1):
        draw(figure.add_subplot(2, 2, place), runs, theme)
    return to_png(figure)


def panel_png(name: str, runs: Sequence[Run], theme: Theme) -> bytes:
    """One of PANELS, of a size that stays readable on a telephone."""
    figure = new_figure(5, 3.1, theme)
    PANELS[name](figure.add_subplot(), runs, theme)
    return to_png(figure)


def reliability_png(found: Calibration, theme: Theme) -> bytes:
    figure = new_figure(4.6, 5.2, theme)
    upper, lower = figure.subplots(2, 1, gridspec_kw={"height_ratios": [1, 4.4]})
    draw_confidences(upper, found, theme)
    draw_reliability(lower, found, theme)
    return to_png(figure)
