"""Sections of the report: headline, curves (of one run or several), configuration, and how to repeat the run.

`results` has the sections about the run's predictions, and `comparison` those that compare several runs.
"""

from collections.abc import Sequence

from markupsafe import Markup

from ddp_trainer.report.charts import PANELS, has_steps, panel_figure
from ddp_trainer.report.confusion import MAX_NUMBERED
from ddp_trainer.report.html import chart, render
from ddp_trainer.report.reproduce import reproduce_commands
from ddp_trainer.report.results import confusion_picture
from ddp_trainer.report.scores import wilson_interval
from ddp_trainer.report.wording import NOTHING, duration, four_digits, percent, plain, quantity
from ddp_trainer.tracking.run_record import Run

TIMES = "\N{MULTIPLICATION SIGN}"


def train_seconds(run: Run) -> float | None:
    """Training time of the run, or of its finished epochs if the run is not finished."""
    _, seconds = run.series("seconds")
    return run.number("train_seconds") or (float(seconds.sum()) if len(seconds) else None)


def latest(run: Run, name: str) -> float | None:
    """A value from the summary, or from the last finished epoch if there is no summary."""
    return run.number(name) if run.summary is not None else (run.metrics[-1].get(name) if run.metrics else None)


def epochs_of(run: Run) -> float:
    """Number of passes over the training images. With --epochs 6.5, the seventh pass counts as 0.5.

    A pass that --max-steps cut short counts as 1.
    """
    begun, planned = run.number("epochs") or len(run.metrics), run.settings.get("epochs")
    return min(begun, planned) if isinstance(planned, int | float) else begun


def hardware(run: Run) -> str:
    return f"{run.world_size} {TIMES} {run.device}"


def operations(run: Run) -> str:
    """The number of operations of the run, and how many of them are in the optimizer, if any."""
    total, optimizer = quantity(run.number("train_pflops"), "PFLOP"), run.number("optimizer_pflops")
    return f"{total}, of which {quantity(optimizer)} in the optimizer" if optimizer else total


def headline(run: Run, *, is_detail: bool = False) -> Markup:
    """The result in large digits. `is_detail`: whether the page also compares this run with others."""
    interval = wilson_interval(*run.counts) if run.counts else None
    facts = {name: value for name, value in _facts(run).items() if value != NOTHING}
    return render("headline.html", run=run, interval=interval, facts=facts, notices=notices(run), is_detail=is_detail)


def _facts(run: Run) -> dict[str, str]:
    return {
        "epochs": f"{epochs_of(run):g} of {plain(run.settings.get('epochs', '?'))}",
        "training time": duration(train_seconds(run)),
        "operations": operations(run),
        "hardware": hardware(run),
        "throughput": quantity(latest(run, "images_per_second"), "images/s"),
        "balanced accuracy": percent(run.number("test_balanced_accuracy")),
        "share of the largest class": percent(run.number("largest_class_share")),
        f"{run.split} loss": four_digits(latest(run, "test_loss")),
        "parameters": quantity(run.number("parameters")),
        "precision": run.precision or NOTHING,
        "recipe": run.recipe or NOTHING,
        "data": run.dataset.source or NOTHING,
    }


def notices(run: Run) -> list[str]:
    """What a reader must know before relying on the results."""
    notes = []
    if run.summary is None:
        state, epochs = run.state or "unknown", len(run.metrics)
        note = f"This run has no summary. Its state is {state}; finished epochs: {epochs}."
        notes.append(note + (" The results are those of the last finished epoch." if epochs else ""))
        if run.message:
            notes.append(run.message)
    if run.split == "validation":
        notes.append("The results are measured on held-out training images, not on the test split.")
    found, counts = run.predictions, run.counts
    if found is not None and counts is not None and (found.num_correct, len(found.labels)) != counts:
        notes.append(
            "predictions.npz is not from the evaluation that gave this accuracy: "
            f"{found.num_correct} of its {len(found.labels)} predictions are correct."
        )
    return notes


def curves(runs: Sequence[Run]) -> Markup:
    """The curves of all runs on common axes. The confusion matrix of a single run is beside them if there is room."""
    whose = " of " + ", ".join(run.name for run in runs) if len(runs) > 1 else ""
    drawn = any(run.metrics for run in runs)
    panels = [chart(panel_figure(name, runs), f"{name} by epoch{whose}") for name in PANELS] if drawn else []
    has_room = len(runs) == 1 and len(runs[0].classes) <= MAX_NUMBERED
    return render(
        "curves.html",
        panels=panels,
        confusion=confusion_picture(runs[0]) if has_room else "",
        several=len(runs) > 1,
        smoothed=any(run.settings.get("label_smoothing") for run in runs),
        has_steps=len(runs) == 1 and has_steps(runs[0]),
    )


def configuration(run: Run) -> Markup:
    """Every setting, the versions and the data, as recorded in config.json."""
    dataset = run.dataset
    data = {
        "source": dataset.source or NOTHING,
        "classes": f"{len(run.classes):,}",
        "image size": plain(dataset.image_size) if dataset.image_size else NOTHING,
        **{f"{name} images": quantity(split.count) for name, split in dataset.splits.items()},
        **{f"{name} sha256": split.sha256 for name, split in dataset.splits.items()},
        "folder": run.data_dir or NOTHING,
        "git commit": run.git_commit or "unknown",
    }
    settings = {name.replace("_", "-"): plain(value) for name, value in run.settings.items()}
    return render("configuration.html", settings=settings, versions=run.versions, data=data)


def reproduce(run: Run) -> Markup:
    return render("reproduce.html", commands=reproduce_commands(run), commit=run.git_commit)
