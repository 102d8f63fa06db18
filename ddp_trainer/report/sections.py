"""The parts of one run's page, from its headline to how it is reproduced. Each gives HTML, or '' where there is nothing."""

import io
import math
from collections.abc import Mapping

import numpy as np

from ddp_trainer.report import charts, matrix, scores
from ddp_trainer.report.command import reproduction
from ddp_trainer.report.page import (
    chart,
    count,
    definitions,
    duration,
    image,
    percent,
    section,
    table,
    text,
    tiles,
)
from ddp_trainer.report.rundata import Predictions, RunData

LARGEST_PICTURE = 96  # pixels; larger ones are made smaller, so that the page stays light
NUM_PAIRS = 12


def headline(run: RunData) -> str:
    summary = run.summary
    recipe = run.config.get("recipe", "run")
    head = f'<h1>{text(run.name)}</h1>\n<p class="quiet">{text(recipe)} on {text(data_name(run))}</p>\n'
    if summary is None:
        return head + interrupted(run)
    correct, total = int(summary["test_correct"]), int(summary["test_total"])
    low, high = scores.wilson_interval(correct, total)
    return (
        f'{head}<p class="headline">{percent(correct / total)} <small>{run.split} accuracy</small></p>\n'
        f"<p>{count(correct)} of {count(total)} {run.split} images right; 95&nbsp;% interval {percent(low)} to {percent(high)}.</p>\n"
        + tiles(facts(run, summary))
    )


def interrupted(run: RunData) -> str:
    """What is known of a run that has not come to its end."""
    state = run.status.get("state", "unknown")
    asked = run.settings.get("epochs")
    done = len(run.records)
    of = f" of {asked}" if asked else ""
    notice = f'<p class="notice">This run is not complete (state: {text(state)}): {done}{text(of)} epochs are recorded.</p>\n'
    if not run.records:
        return notice
    last = run.records[-1]
    figure = f'<p class="headline">{percent(last.get("test_accuracy", math.nan))} <small>{run.split} accuracy so far</small></p>\n'
    entries = [
        ("Training time", duration(sum(run.column("seconds")))),
        ("Throughput", f"{count(last.get('images_per_second', math.nan))} images/s"),
        ("Hardware", hardware(run)),
    ]
    return figure + notice + tiles(entries)


def facts(run: RunData, summary: Mapping[str, object]) -> list[tuple[str, str]]:
    def number(name: str) -> float:
        value = summary.get(name)
        return float(value) if isinstance(value, int | float) else math.nan

    entries = [
        ("With flipped copies", percent(number("test_accuracy_tta")), number("test_accuracy_tta")),
        (f"{run.split.capitalize()} loss", f"{number('test_loss'):.4f}", number("test_loss")),
        ("Epochs", count(number("epochs")), number("epochs")),
        ("Steps", count(number("steps")), number("steps")),
        ("Training time", duration(number("train_seconds")) if number("train_seconds") > 0 else "", 0.0),
        ("Throughput", f"{count(number('images_per_second'))} images/s", number("images_per_second")),
        ("Training operations", f"{number('train_pflops'):.4g} PFLOP", number("train_pflops")),
        ("Parameters", count(number("parameters")), number("parameters")),
    ]
    shown = [(name, value) for name, value, known in entries if not math.isnan(known)]
    return [*shown, ("Precision", str(summary.get("precision") or run.config.get("precision") or "")),
            ("Hardware", hardware(run))]  # fmt: skip


def hardware(run: RunData) -> str:
    name = run.config.get("device_name") or run.config.get("device") or ""
    world = run.config.get("world_size") or 1
    return f"{world} × {name}" if world != 1 else str(name)


def data_name(run: RunData) -> str:
    dataset = run.config.get("dataset") or {}
    sizes = {name: (split or {}).get("count") for name, split in (dataset.get("splits") or {}).items()}
    images = f", {count(sizes['train'])} training images" if sizes.get("train") else ""
    return f"{dataset.get('source', 'unknown data')}{images}, {len(run.classes)} classes"


def curves(run: RunData, panels: Mapping[str, charts.Draw]) -> str:
    if not run.records:
        return section("Training", "No epoch has been finished, so there are no curves.")
    first, last = run.records[0], run.records[-1]

    def course(name: str) -> str:
        return f"from {first.get(name, math.nan):.4g} to {last.get(name, math.nan):.4g} over {len(run.records)} epochs"

    alts = {
        "loss": f"Training loss {course('train_loss')}, {run.split} loss {course('test_loss')}",
        "accuracy": f"Training accuracy {course('train_accuracy')}, {run.split} accuracy {course('test_accuracy')}",
        "learning_rate": f"Learning rate {course('learning_rate')}",
        "throughput": f"Images per second {course('images_per_second')}",
    }
    drawn = "".join(chart(charts.svg(panel), alts[name]) for name, panel in panels.items())
    lead = "Training figures are means over the augmented images of an epoch, taken while the weights still change."
    return section("Training", lead, f'<div class="charts">{drawn}</div>\n')


def confusion(run: RunData, counts: np.ndarray | None) -> str:
    if counts is None:
        return section("Predictions", "There are none: they are written when a run is complete.")
    pairs = scores.confused_pairs(counts, NUM_PAIRS)
    wrong = int(counts.sum() - np.trace(counts))
    alt = f"Confusion matrix of {len(run.classes)} classes; {wrong} of {counts.sum()} images are off its diagonal"
    drawing = charts.svg(matrix.draw_matrix(counts, run.classes), size=matrix.matrix_size(len(run.classes)))
    is_huge = len(run.classes) > matrix.MAX_WRITTEN
    rows = [
        [
            f"{text(run.classes[pair.label])} → {text(run.classes[pair.predicted])}",
            count(pair.count),
            percent(pair.share, 1),
        ]
        for pair in pairs
    ]
    listing = table(["true → predicted", "images", "of the class"], rows) if rows else "<p>No image was confused.</p>"
    picture = chart(drawing, alt, style="huge" if is_huge else "wide")
    both = (
        f"{picture}<div style='margin-top:1rem'>{listing}</div>"
        if is_huge
        else f'<div class="beside">{picture}{listing}</div>'
    )
    lead = "Rows are the true classes, columns the predicted ones: blue is right, orange is confused."
    return section("What is taken for what", lead, both)


def per_class(run: RunData, counts: np.ndarray | None) -> str:
    if counts is None:
        return ""
    found = sorted(scores.class_scores(counts), key=lambda item: (math.isnan(item.recall), item.recall))
    rows = [
        [text(run.classes[item.label]), count(item.count), percent(item.precision, 1), percent(item.recall, 1),
         f'<i style="width:{0 if math.isnan(item.recall) else 100 * item.recall:.1f}%"></i>']
        for item in found
    ]  # fmt: skip
    lead = "Recall: the share of a class that is found. Precision: the share of what is taken for it that is right. Weakest first."
    listing = table(["class", "images", "precision", "recall", ""], rows)
    return section("Class by class", lead, listing.replace('class="num"><i', 'class="meter"><i'))


def calibration(run: RunData, predictions: Predictions | None) -> str:
    if predictions is None:
        return ""
    confidence = predictions.probabilities.max(axis=1)
    bins = scores.reliability_bins(confidence, predictions.probabilities.argmax(axis=1) == predictions.labels)
    error = scores.expected_calibration_error(bins)
    mean = float(confidence.mean())
    alt = f"Reliability diagram; expected calibration error {percent(error)}, mean confidence {percent(mean)}"
    entries = [("Expected calibration error", percent(error)), ("Mean confidence", percent(mean))]
    rows = [
        [
            f"{100 * item.low:.0f} to {100 * item.high:.0f} %",
            count(item.count),
            percent(item.confidence, 1),
            percent(item.accuracy, 1),
        ]
        for item in bins
        if item.count
    ]
    lead = "Does 90 % sure mean right 9 times out of 10? Bars below the dashed line: surer than it should be."
    picture = chart(charts.svg(charts.draw_reliability(bins), size=(4.6, 3.6)), alt)
    listing = table(["confidence", "images", "mean", "right"], rows)
    return section("Calibration", lead, tiles(entries), f'<div class="beside">{picture}{listing}</div>')


def gallery(run: RunData, predictions: Predictions | None) -> str:
    if predictions is None:
        return ""
    if not len(predictions.wrong_images):
        return section("Most confident mistakes", "No image was misclassified.")
    figures = []
    for picture, truth, answer, sure in mistakes(run, predictions):
        alt = f"{truth}, taken for {answer} with {percent(sure, 1)}"
        caption = f"<b>{text(truth)}</b><br>taken for <em>{text(answer)}</em><br>{percent(sure, 1)}"
        figures.append(f"<figure>{image(encode(picture), alt)}<figcaption>{caption}</figcaption></figure>")
    lead = "The images that the network got wrong while it was surest. Some labels may be the ones that are wrong."
    return section("Most confident mistakes", lead, f'<div class="gallery">{"".join(figures)}</div>')


def mistakes(run: RunData, predictions: Predictions) -> list[tuple[np.ndarray, str, str, float]]:
    """(pixels, true class, predicted class, its probability), the most confident first."""
    answers = predictions.wrong_probabilities.argmax(axis=1)
    return [
        (picture, run.classes[int(label)], run.classes[int(answer)], float(row[answer]))
        for picture, label, answer, row in zip(
            predictions.wrong_images, predictions.wrong_labels, answers, predictions.wrong_probabilities, strict=True
        )
    ]


def encode(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> PNG."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    with io.BytesIO() as file:
        picture.save(file, format="png")
        return file.getvalue()


def configuration(run: RunData) -> str:
    config = run.config
    versions = config.get("versions") or {}
    surroundings = [*versions.items(), ("git commit", (config.get("git_commit") or "–")[:13]),
                    ("processes", config.get("world_size", "–")), ("device", config.get("device", "–"))]  # fmt: skip
    return (
        section(
            "Configuration", "", definitions([(name.replace("_", " "), value) for name, value in run.settings.items()])
        )
        + section("Versions", "", definitions(surroundings))
        + section("To reproduce it", "", f"<pre>{text(reproduction(run))}</pre>\n")
    )
