"""What the page says of one run, section by section. Each function returns HTML, empty where the run lacks the files.

Not owned here: layout and escaping (`page`), arithmetic (`scores`), the commands to run it again (`recipe_text`).
"""

import json
import math

import numpy as np

from ddp_trainer.report.charts import PANELS
from ddp_trainer.report.loading import Run, list_mistakes, mapping
from ddp_trainer.report.matrices import MAX_NUMBERED, confusion_png
from ddp_trainer.report.page import escape, figure, image, section, table, themed_image
from ddp_trainer.report.pictures import panel_png, reliability_png
from ddp_trainer.report.reproduce import reproduce
from ddp_trainer.report.scores import (
    calibration,
    confused_pairs,
    confusion_counts,
    precision_and_recall,
    wilson_interval,
)  # fmt: skip

NUM_PAIRS = 12
NOTHING = "\N{EN DASH}"  # where a figure is not known
TIMES = "\N{MULTIPLICATION SIGN}"
ROWS_PER_TABLE = 25


def describe(run: Run, *, details: bool = False) -> str:
    """All sections. details: the page is about several runs, and this one comes after their comparison."""
    heading = f"Details of {run.name}" if details else run.name
    parts = [headline(run, heading)]
    if not details:
        parts.append(curves(run))
    return "".join([*parts, confusion(run), classes(run), reliability(run), gallery(run), facts(run), reproduce(run)])


def percent(share: float | None, digits: int = 2) -> str:
    return NOTHING if share is None or math.isnan(share) else f"{share:.{digits}%}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def train_seconds(run: Run) -> float | None:
    """Of all finished epochs where the run is not complete."""
    _, seconds = run.series("seconds")
    return run.number("train_seconds") or (float(seconds.sum()) if len(seconds) else None)


def latest(run: Run, name: str) -> float | None:
    """From the summary, else from the last finished epoch."""
    return run.number(name) if run.summary is not None else (run.metrics[-1].get(name) if run.metrics else None)


def hardware(run: Run) -> str:
    world_size = run.config.get("world_size") or 1
    return f"{world_size} {TIMES} {run.config.get('device_name') or run.config.get('device') or 'unknown device'}"


def quantity(value: float | None, unit: str = "") -> str:
    if value is None:
        return NOTHING
    number = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{number} {unit}".strip()


def headline(run: Run, heading: str) -> str:
    counts = run.counts
    if counts is not None and counts[1]:
        low, high = wilson_interval(*counts)
        said = (
            f"<span>accuracy on {counts[0]:,} of {counts[1]:,} {escape(run.split)} images"
            f'<br><span class="muted">95% interval (Wilson) {percent(low)} to {percent(high)}</span></span>'
        )
    else:
        said = f"<span>accuracy on the {escape(run.split)} images</span>"
    finished = run.number("epochs") or len(run.metrics)
    rows = {
        "with mirror images (TTA)": percent(run.number("test_accuracy_tta")),
        f"{run.split} loss": quantity(latest(run, "test_loss")),
        "epochs": f"{finished:g} of {run.settings.get('epochs', '?')}",
        "training time": duration(train_seconds(run)),
        "operations": quantity(run.number("train_pflops"), "PFLOP"),
        "throughput": quantity(latest(run, "images_per_second"), "images/s"),
        "parameters": quantity(run.number("parameters")),
        "hardware": hardware(run),
        "precision": (run.summary or {}).get("precision") or run.config.get("precision") or NOTHING,
        "recipe": run.config.get("recipe") or NOTHING,
    }
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items())
    level = "h2" if heading != run.name else "h1"
    return (
        f'<header><{level}>{escape(heading)}</{level}><div class="hero"><strong>{percent(run.accuracy)}</strong>'
        f'{said}</div>{notice(run)}<dl class="facts card">{cells}</dl></header>\n'
    )


def notice(run: Run) -> str:
    """What a reader must know before he believes the figures."""
    notes = []
    if run.summary is None:
        state = run.status.get("state") or "not complete"
        after = f"after {len(run.metrics)} finished epochs" if len(run.metrics) != 1 else "after 1 finished epoch"
        notes.append(f"This run has no summary: its state is {state}, {after}. Figures are those of its last epoch.")
        if run.status.get("message"):
            notes.append(str(run.status["message"]))
    if run.split == "validation":
        notes.append("Measured on training images that were held out, not on the test split.")
    found, counts = run.predictions, run.counts
    if found is not None and counts is not None:
        correct = int((found.predicted == found.labels).sum())
        if (correct, len(found.labels)) != counts:
            notes.append(f"predictions.npz says {correct} of {len(found.labels)}: it is of another evaluation.")
    return f'<div class="notice">{"<br>".join(map(escape, notes))}</div>' if notes else ""


def curves(run: Run) -> str:
    if not run.metrics:
        return section("Curves", "<p>No epoch was finished, so there is nothing to draw.</p>")
    cards = "".join(
        figure(themed_image(lambda theme, name=name: panel_png(name, [run], theme), f"{name} for each epoch"))
        for name in PANELS
    )
    return section("Curves", f'<div class="grid two">{cards}</div>')


def confusion(run: Run) -> str:
    found = run.predictions
    if found is None:
        return ""
    counts = confusion_counts(found.labels, found.predicted, len(run.classes))
    wide = len(run.classes) > MAX_NUMBERED
    pairs = confused_pairs(counts, NUM_PAIRS)
    totals = counts.sum(axis=1)
    rows = [
        (escape(run.classes[pair.true]), escape(run.classes[pair.predicted]), f"{pair.images:,}",
         percent(pair.images / totals[pair.true], 1))
        for pair in pairs
    ]  # fmt: skip
    alt = f"Confusion matrix of {len(run.classes)} classes: {counts.trace():,} of {counts.sum():,} images are right"
    numbers = "" if wide else "Numbers are images. "
    picture = figure(
        ('<div class="wide" tabindex="0">' if wide else "<div>")
        + themed_image(lambda theme: confusion_png(counts, run.classes, theme), alt)
        + "</div>",
        f"{numbers}Colour is the share of the true class, on a square-root scale so that rare mistakes show.",
        "" if wide else "medium",
    )
    listed = table(("is", "taken for", "images", "of the class"), rows, numeric=2) if rows else "<p>No mistakes.</p>"
    beside = f'<div class="card"><h3>Most often confused</h3>{listed}</div>'
    if wide:
        return section("Confusion", picture, '<div style="height:16px"></div>', beside)
    return section("Confusion", f'<div class="grid two">{picture}{beside}</div>')


def classes(run: Run) -> str:
    found = run.predictions
    if found is None:
        return ""
    counts = confusion_counts(found.labels, found.predicted, len(run.classes))
    precision, recall = precision_and_recall(counts)

    def share(value: float) -> str:
        filled = 0 if math.isnan(value) else value
        return f'{percent(value, 1)}<span class="bar"><i style="width:{filled:.1%}"></i></span>'

    rows = [
        (escape(name), f"{counts[label].sum():,}", share(precision[label]), share(recall[label]))
        for label, name in enumerate(run.classes)
    ]
    head = ("class", "images", "precision", "recall")
    tables = "".join(
        f'<div class="card">{table(head, rows[start : start + ROWS_PER_TABLE], numeric=1)}</div>'
        for start in range(0, len(rows), ROWS_PER_TABLE)
    )
    says = (
        '<p class="muted">Precision: of the images given this class, the share that has it. '
        "Recall: of the images that have it, the share that was found.</p>"
    )
    return section("Classes", says, f'<div class="grid">{tables}</div>')


def reliability(run: Run) -> str:
    found = run.predictions
    if found is None:
        return ""
    measured = calibration(found.labels, found.probabilities)
    mean = float(np.asarray(found.probabilities, dtype=float).max(axis=1).mean())
    right = float((found.predicted == found.labels).mean())
    leaning = "surer of itself than it is right" if mean > right else "right more often than it is sure"
    picture = themed_image(
        lambda theme: reliability_png(measured, theme),
        f"Reliability diagram; expected calibration error {measured.error:.2%}",
    )
    words = (
        f'<div class="card"><h3>Expected calibration error {measured.error:.2%}</h3><p>On average the model gives its '
        f"choice a probability of {mean:.2%} and is right {right:.2%} of the time: it is {leaning}.</p>"
        '<p class="muted">Bars on the dashed line would mean that of the images given a probability of 80%, 80% '
        "are right. The error is the mean distance from the line over all images, in 15 bins of equal width. The upper "
        "bars count the images in each bin, on a logarithmic scale.</p></div>"
    )
    return section("Calibration", f'<div class="grid two">{figure(picture, kind="small")}{words}</div>')


def gallery(run: Run) -> str:
    mistakes = list_mistakes(run)
    if run.predictions is None or not mistakes:
        return ""
    cards = []
    for mistake in mistakes:
        said = f"{mistake.true}, taken for {mistake.predicted} with {mistake.probability:.1%}"
        caption = f"<b>{escape(mistake.true)}</b><br>taken for {escape(mistake.predicted)}<br>{mistake.probability:.1%}"
        picture = image(mistake.pixels, f"Image {mistake.sample}: {said}")
        cards.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    total = int((run.predictions.predicted != run.predictions.labels).sum())
    those = f"All {total} mistakes" if total == len(cards) else f"The surest {len(cards)} of {total:,} mistakes"
    says = f'<p class="muted">{those}, with the probability the model gave its answer; the surest first.</p>'
    return section("Most confident mistakes", says, f'<div class="gallery card">{"".join(cards)}</div>')


def facts(run: Run) -> str:
    """Every setting, the versions and the data, as they stand in config.json."""
    dataset = mapping(run.config.get("dataset"))
    splits = {name: mapping(split) for name, split in mapping(dataset.get("splits")).items()}
    data = {
        "source": dataset.get("source"), "classes": len(run.classes), "image size": dataset.get("image_size"),
        **{f"{name} images": split.get("count") for name, split in splits.items()},
        **{f"{name} sha256": split.get("sha256") for name, split in splits.items()},
        "folder": run.config.get("data_dir"), "git commit": run.config.get("git_commit") or "unknown",
    }  # fmt: skip
    blocks = (("Settings", run.settings), ("Versions", mapping(run.config.get("versions"))), ("Data and code", data))
    cards = "".join(
        f'<div class="card"><h3>{title}</h3>'
        + table(("", ""), [(escape(name), escape(plain(value))) for name, value in block.items()])
        + "</div>"
        for title, block in blocks
        if block
    )
    return section("Configuration", f'<div class="grid" style="align-items:start">{cards}</div>')


def plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
