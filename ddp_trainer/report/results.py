"""The sections of the report page that show a run's predictions: confusion, classes, calibration, mistakes.

`scores` does the arithmetic; `confusion`, `charts` and `gallery` draw.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from ddp_trainer.report.charts import reliability_figure
from ddp_trainer.report.confusion import MAX_LABELED, MAX_NUMBERED, cells_png, confusion_figure
from ddp_trainer.report.gallery import MAX_SIDE, image_url
from ddp_trainer.report.html import chart, picture, render
from ddp_trainer.report.labels import distinct_labels
from ddp_trainer.report.scores import NUM_BINS, calibration, class_counts, confused_pairs, precision_and_recall
from ddp_trainer.tracking.predictions import Predictions
from ddp_trainer.tracking.run_record import Run, list_mistakes

NUM_PAIRS = 12  # pairs of classes that are listed as most often confused
NUM_PAIRS_OF_MANY = 30  # replaces NUM_PAIRS if there are too many classes for labels in the picture
MAX_ROWS = 1000  # classes listed with precision and recall
ROWS_PER_TABLE = 25
MAX_TABLES = 3  # side by side, if there is room


class ClassRow(NamedTuple):
    number: int
    name: str
    images: int
    precision: float
    recall: float


def results(run: Run, *, is_detail: bool = False) -> Markup:
    """All sections about the predictions. `is_detail`: whether the page also compares this run with others.

    The confusion matrix is left out if `sections.curves` shows it beside the curves.
    """
    found = run.predictions
    if found is None:
        return Markup("")
    matrix = confusion(run, found, show_matrix=is_detail or len(run.classes) > MAX_NUMBERED)
    return Markup("").join([matrix, classes(run, found), reliability(run, found), mistakes(run, found)])


def confusion_picture(run: Run) -> Markup:
    """The confusion matrix; empty if the run has no predictions."""
    found = run.predictions
    if found is None:
        return Markup("")
    correct = f"{found.num_correct:,} of {len(found.labels):,} images are classified correctly"
    described = f"Confusion matrix of {len(run.classes)} classes: {correct}"
    if len(run.classes) > MAX_LABELED:
        return picture(cells_png(found, transparent=True), described)
    return chart(confusion_figure(found, distinct_labels(run.classes)), described)


def confusion(run: Run, found: Predictions, *, show_matrix: bool) -> Markup:
    """The classes that are most often confused and, if `show_matrix` is true, the confusion matrix."""
    num_classes = len(run.classes)
    totals = class_counts(found.labels, num_classes)
    limit = NUM_PAIRS_OF_MANY if num_classes > MAX_LABELED else NUM_PAIRS
    pairs = [
        (run.classes[pair.true], run.classes[pair.predicted], pair.images, pair.images / totals[pair.true])
        for pair in confused_pairs(found.labels, found.predicted, limit)
    ]
    return render(
        "confusion.html",
        picture=confusion_picture(run) if show_matrix else "",
        is_small=num_classes <= MAX_NUMBERED,
        is_labeled=num_classes <= MAX_LABELED,
        pairs=pairs,
    )


def classes(run: Run, found: Predictions) -> Markup:
    """A row for each class or, if there are more than MAX_ROWS, for the MAX_ROWS classes with the lowest recall."""
    rows = class_rows(run.classes, found)
    if len(rows) > MAX_ROWS:
        rows = sorted(rows, key=lambda row: (math.isnan(row.recall), row.recall))[:MAX_ROWS]
    length = max(ROWS_PER_TABLE, -(-len(rows) // MAX_TABLES))
    tables = [rows[start : start + length] for start in range(0, len(rows), length)]
    return render("classes.html", tables=tables, left_out=len(run.classes) - len(rows))


def class_rows(names: Sequence[str], found: Predictions) -> list[ClassRow]:
    precision, recall = precision_and_recall(found.labels, found.predicted, len(names))
    totals = class_counts(found.labels, len(names))
    columns = (range(len(names)), names, totals.tolist(), precision.tolist(), recall.tolist())
    return [ClassRow(*values) for values in zip(*columns, strict=True)]


def reliability(run: Run, found: Predictions) -> Markup:
    measured = calibration(found.labels, found.predicted, found.confidence)
    confidence, accuracy = float(found.confidence.mean()), found.num_correct / len(found.labels)
    return render(
        "reliability.html",
        picture=chart(reliability_figure(measured), f"Reliability diagram; calibration error {measured.error:.2%}"),
        error=measured.error,
        confidence=confidence,
        accuracy=accuracy,
        num_images=len(found.labels),
        num_bins=NUM_BINS,
        temperature=run.number("temperature"),
        error_before=run.number("calibration_error_before"),
        num_calibrated=run.settings.get("calibrate"),
    )


def mistakes(run: Run, found: Predictions) -> Markup:
    shown = [
        (mistake, image_url(mistake.pixels), max(mistake.pixels.shape[:2]) < MAX_SIDE) for mistake in list_mistakes(run)
    ]
    total = int(np.count_nonzero(found.predicted != found.labels))
    return render("mistakes.html", shown=shown, total=total) if shown else Markup("")
