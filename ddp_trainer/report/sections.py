"""What the page says of one run, section by section, from its headline to the configuration. Functions return HTML.

Not owned here: layout and escaping (`page`), what the predictions tell (`results`), the commands to run it again
(`reproduce`).
"""

from ddp_trainer.report.charts import PANELS
from ddp_trainer.report.page import escape, figure, pairs, section, themed_image
from ddp_trainer.report.pictures import panel_png
from ddp_trainer.report.reproduce import reproduce
from ddp_trainer.report.results import results
from ddp_trainer.report.scores import wilson_interval
from ddp_trainer.report.wording import NOTHING, duration, four_digits, percent, plain, quantity
from ddp_trainer.tracking.run_record import Run, mapping

TIMES = "\N{MULTIPLICATION SIGN}"


def describe(run: Run, *, details: bool = False) -> str:
    """All sections. details: the page is about several runs, and this one comes after their comparison."""
    if details:
        return headline(run, f"<h2>Details of {escape(run.name)}</h2>") + results(run) + facts(run) + reproduce(run)
    heading = f'<p class="muted">Training report</p><h1>{escape(run.name)}</h1>'
    return headline(run, heading) + curves([run]) + results(run) + facts(run) + reproduce(run)


def train_seconds(run: Run) -> float | None:
    """Of all finished epochs where the run is not complete."""
    _, seconds = run.series("seconds")
    return run.number("train_seconds") or (float(seconds.sum()) if len(seconds) else None)


def latest(run: Run, name: str) -> float | None:
    """From the summary, else from the last finished epoch."""
    return run.number(name) if run.summary is not None else (run.metrics[-1].get(name) if run.metrics else None)


def finished_epochs(run: Run) -> float:
    return run.number("epochs") or len(run.metrics)


def hardware(run: Run) -> str:
    world_size = run.config.get("world_size") or 1
    return f"{world_size} {TIMES} {run.config.get('device_name') or run.config.get('device') or 'unknown device'}"


def headline(run: Run, heading: str) -> str:
    """`heading` is HTML. Figures that an interrupted run does not have are left out."""
    rows = {
        "epochs": f"{finished_epochs(run):g} of {run.settings.get('epochs', '?')}",
        "training time": duration(train_seconds(run)),
        "operations": quantity(run.number("train_pflops"), "PFLOP"),
        "hardware": hardware(run),
        "throughput": quantity(latest(run, "images_per_second"), "images/s"),
        f"{run.split} loss": four_digits(latest(run, "test_loss")),
        "parameters": quantity(run.number("parameters")),
        "precision": (run.summary or {}).get("precision") or run.config.get("precision") or NOTHING,
        "recipe": run.config.get("recipe") or NOTHING,
        "data": mapping(run.config.get("dataset")).get("source") or NOTHING,
    }
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in rows.items()
        if value != NOTHING
    )
    hero = f'<div class="hero"><strong>{percent(run.accuracy)}</strong><span>{accuracy_in_words(run)}</span></div>'
    return f'<header>{heading}{hero}{notice(run)}<dl class="facts card">{cells}</dl></header>\n'


def accuracy_in_words(run: Run) -> str:
    counts, with_views = run.counts, run.number("test_accuracy_tta")
    if counts is None or not counts[1]:
        return f"accuracy on the {escape(run.split)} images"
    low, high = wilson_interval(*counts)
    said = (
        f"accuracy on {counts[0]:,} of {counts[1]:,} {escape(run.split)} images"
        f'<br><span class="muted">95% interval (Wilson) {percent(low)} to {percent(high)}</span>'
    )
    if with_views is not None:
        said += f'<br><span class="muted">{percent(with_views)} with six-view test-time augmentation</span>'
    return said


def notice(run: Run) -> str:
    """What a reader must know before he believes the figures."""
    notes = []
    if run.summary is None:
        state = run.status.get("state") or "not complete"
        after = f"after {len(run.metrics)} finished epochs" if len(run.metrics) != 1 else "after 1 finished epoch"
        notes.append(f"This run has no summary: its state is {state}, {after}.")
        if run.metrics:
            notes[0] += " Figures are those of its last epoch."
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


def curves(runs: list[Run]) -> str:
    """Of one run, or of several on common axes."""
    if not any(run.metrics for run in runs):
        return section("Curves", "<p>No epoch was finished, so there is nothing to draw.</p>")
    whose = " of " + ", ".join(run.name for run in runs) if len(runs) > 1 else ""
    cards = "".join(
        figure(themed_image(lambda theme, name=name: panel_png(name, runs, theme), f"{name} for each epoch{whose}"))
        for name in PANELS
    )
    key = "Colours are those of the table above. Dashed: training. " if len(runs) > 1 else ""
    return section("Curves", f'<p class="muted">{key}{footing(runs)}</p>', f'<div class="grid two">{cards}</div>')


def footing(runs: list[Run]) -> str:
    """Why training and evaluation cannot be compared to the digit."""
    smoothed = any(run.settings.get("label_smoothing") for run in runs)
    said = "Training figures are of augmented images, taken while the epoch goes on"
    return said + (", and their loss is of smoothed labels, which is never near zero." if smoothed else ".")


def facts(run: Run) -> str:
    """Every setting, the versions and the data, as they stand in config.json."""
    dataset = mapping(run.config.get("dataset"))
    splits = {name: mapping(split) for name, split in mapping(dataset.get("splits")).items()}
    data = {
        "source": dataset.get("source"),
        "classes": len(run.classes),
        "image size": dataset.get("image_size"),
        **{f"{name} images": split.get("count") for name, split in splits.items()},
        **{f"{name} sha256": split.get("sha256") for name, split in splits.items()},
        "folder": run.config.get("data_dir"),
        "git commit": run.config.get("git_commit") or "unknown",
    }
    settings = {name.replace("_", "-"): plain(value) for name, value in run.settings.items()}
    beside = pairs("Versions", mapping(run.config.get("versions"))) + pairs(
        "Data and code", {name: plain(value) for name, value in data.items()}
    )
    return section("Configuration", pairs("Settings", settings, columns=True), f'<div class="grid two">{beside}</div>')
