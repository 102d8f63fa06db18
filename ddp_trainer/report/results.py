"""What the network learned, from its predictions: confusion, classes, calibration, mistakes. Each returns HTML.

A function returns nothing where the run has no predictions. Not owned here: arithmetic (`scores`), pictures.
"""

import math

from ddp_trainer.report.matrices import MAX_NUMBERED, confusion_png
from ddp_trainer.report.page import escape, figure, image, section, table, themed_image
from ddp_trainer.report.pictures import reliability_png
from ddp_trainer.report.scores import (
    NUM_BINS,
    calibration,
    confused_pairs,
    confusion_counts,
    precision_and_recall,
)
from ddp_trainer.report.wording import percent
from ddp_trainer.tracking.run_record import Predictions, Run, list_mistakes

NUM_PAIRS = 12
ROWS_PER_TABLE = 25
MAX_TABLES = 3  # beside each other, where there is room


def results(run: Run) -> str:
    found = run.predictions
    if found is None:
        return ""
    return confusion(run, found) + per_class(run, found) + reliability(found) + gallery(run, found)


def confusion(run: Run, found: Predictions) -> str:
    counts = confusion_counts(found.labels, found.predicted, len(run.classes))
    wide = len(run.classes) > MAX_NUMBERED
    alt = f"Confusion matrix of {len(run.classes)} classes: {counts.trace():,} of {counts.sum():,} images are right"
    picture = figure(
        ('<div class="wide" tabindex="0">' if wide else "<div>")
        + themed_image(lambda theme: confusion_png(counts, run.classes, theme), alt)
        + "</div>",
        ("" if wide else "Numbers are images. ")
        + "Colour is the share of the true class, on a square-root scale so that rare mistakes show.",
        "" if wide else "medium" if len(run.classes) > 4 else "small",
    )
    totals = counts.sum(axis=1)
    rows = [
        (
            escape(run.classes[pair.true]),
            escape(run.classes[pair.predicted]),
            f"{pair.images:,}",
            percent(pair.images / totals[pair.true], 1),
        )
        for pair in confused_pairs(counts, NUM_PAIRS)
    ]
    listed = table(("is", "taken for", "images", "of the class"), rows, numeric=2) if rows else "<p>No mistakes.</p>"
    pairs = f'<div class="card"><h3>Most often confused</h3>{listed}</div>'
    return section("Confusion", f'<div class="{"stack" if wide else "grid two"}">{picture}{pairs}</div>')


def per_class(run: Run, found: Predictions) -> str:
    counts = confusion_counts(found.labels, found.predicted, len(run.classes))
    precision, recall = precision_and_recall(counts)

    def share(value: float) -> str:
        filled = 0 if math.isnan(value) else value
        return f'{percent(value, 1)}<span class="bar"><i style="width:{filled:.1%}"></i></span>'

    rows = [
        (escape(name), f"{counts[label].sum():,}", share(precision[label]), share(recall[label]))
        for label, name in enumerate(run.classes)
    ]
    length = max(ROWS_PER_TABLE, -(-len(rows) // MAX_TABLES))
    tables = "".join(
        '<div class="card">'
        + table(("class", "images", "precision", "recall"), rows[start : start + length], numeric=1)
        + "</div>"
        for start in range(0, len(rows), length)
    )
    says = (
        '<p class="muted">Precision: of the images given this class, the share that has it. '
        "Recall: of the images that have it, the share that was found.</p>"
    )
    return section("Classes", says, f'<div class="grid">{tables}</div>')


def reliability(found: Predictions) -> str:
    measured = calibration(found.labels, found.probabilities)
    sure, right = float(found.probabilities.max(axis=1).mean()), float((found.predicted == found.labels).mean())
    if abs(sure - right) < 0.005:
        leaning = "it is as sure as it is right"
    elif sure > right:
        leaning = "it is surer of itself than it is right"
    else:
        leaning = "it is right more often than it is sure"
    picture = themed_image(
        lambda theme: reliability_png(measured, theme),
        f"Reliability diagram; expected calibration error {measured.error:.2%}",
    )
    words = (
        f'<div class="card"><h3>Expected calibration error {measured.error:.2%}</h3><p>On average the model gives its '
        f"choice a probability of {sure:.2%} and is right {right:.2%} of the time: {leaning}.</p>"
        '<p class="muted">Bars on the dashed line would mean that of the images given a probability of 80%, 80% '
        f"are right. The error (ECE) is the mean distance from the line over all images, in {NUM_BINS} bins of equal "
        "width. The upper bars count the images in each bin, on a logarithmic scale.</p></div>"
    )
    return section("Calibration", f'<div class="grid two">{figure(picture, kind="small")}{words}</div>')


def gallery(run: Run, found: Predictions) -> str:
    cards = []
    for mistake in list_mistakes(run):
        said = f"{mistake.true}, taken for {mistake.predicted} with {mistake.probability:.1%}"
        caption = f"<b>{escape(mistake.true)}</b><br>taken for {escape(mistake.predicted)}<br>{mistake.probability:.1%}"
        picture = image(mistake.pixels, f"Image {mistake.sample}: {said}")
        cards.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    if not cards:
        return ""
    total = int((found.predicted != found.labels).sum())
    those = f"All {total} mistakes" if total == len(cards) else f"The surest {len(cards)} of {total:,} mistakes"
    says = (
        f'<p class="muted">{those}: the true class, the class it was taken for, and the probability that was given '
        "to that answer.</p>"
    )
    return section("Most confident mistakes", says, f'<div class="gallery card">{"".join(cards)}</div>')
