"""Compares several runs: curves on common axes, settings that differ, and mean and standard deviation over seeds."""

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from markupsafe import Markup

from data_prep.json_fields import Setting, is_number
from ddp_trainer.config import LEFT_OUT, NO_DIFFERENCE
from ddp_trainer.report.figures import look_of
from ddp_trainer.report.html import render
from ddp_trainer.report.scores import wilson_interval
from ddp_trainer.report.sections import curves, epochs_of, hardware, latest, train_seconds
from ddp_trainer.report.wording import NOTHING, duration, four_digits, percent, plain, quantity
from ddp_trainer.tracking.run_record import Run


class Column(NamedTuple):
    """A column of the overview table: its name, the value for a run, and how to write the value."""

    name: str
    value: Callable[[Run], float | None]
    write: Callable[[float | None], str]


FIGURES = (
    Column("accuracy", lambda run: run.accuracy, percent),
    Column("with TTA", lambda run: run.number("test_accuracy_tta"), percent),
    Column("loss", lambda run: latest(run, "test_loss"), four_digits),
    Column("epochs", epochs_of, quantity),
    Column("time", train_seconds, duration),
    Column("PFLOP", lambda run: run.number("train_pflops"), quantity),
    Column("images/s", lambda run: latest(run, "images_per_second"), quantity),
)


class Row(NamedTuple):
    """One run, or the mean or standard deviation of several runs."""

    name: str
    cells: list[str]
    series: int | None  # number of the run's color; None for a mean or standard deviation
    finished: bool = True
    marker: str = ""  # the character for the marker of the run's curves


def compare(runs: Sequence[Run]) -> Markup:
    rows = []
    for group in same_configuration(runs):
        rows += [_run_row(run, runs.index(run)) for run in group]
        if len(group) > 1:
            rows += [_spread_row(group, "mean", mean), _spread_row(group, "standard deviation", stdev)]
    measured = _runs_of_one_configuration(runs)
    return render(
        "comparison.html",
        runs=runs,
        measured=measured,
        shares=[run.accuracy for run in measured],
        head=["run", *(figure.name for figure in FIGURES), "95% interval", "hardware"],
        rows=rows,
        different_images=len({run.evaluated_images for run in runs}) > 1,
        differences=_differences(runs),
        curves=curves(runs),
        mean=mean,
        stdev=stdev,
    )


def same_configuration(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of finished runs that differ only in their seed and the settings in NO_DIFFERENCE.

    Each unfinished run is a group of its own.
    """
    groups: dict[object, list[Run]] = {}
    for run in runs:
        # `run.precision` is the precision that the setting `auto` chose.
        names = run.settings.keys() - {*NO_DIFFERENCE, "seed", "precision"}
        settings = {name: _comparable(run.settings[name]) for name in names}
        recorded = (run.dataset, run.world_size, run.precision)
        same = (run.split, run.classes, repr(recorded), repr(sorted(settings.items())))
        groups.setdefault(same if run.summary is not None else run.path, []).append(run)
    return list(groups.values())


def _comparable(value: Setting) -> Setting:
    """`value` as a float if it is a number: a recipe may have 11 where a flag gives 11.0."""
    return float(value) if is_number(value) else value  # type: ignore[arg-type]


def _runs_of_one_configuration(runs: Sequence[Run]) -> list[Run]:
    """All finished runs. Empty if there are fewer than two, or if their configurations differ."""
    groups = same_configuration([run for run in runs if run.summary is not None])
    measured = [run for run in groups[0] if run.accuracy is not None] if len(groups) == 1 else []
    return measured if len(measured) > 1 else []


def _run_row(run: Run, number: int) -> Row:
    interval = " to ".join(map(percent, wilson_interval(*run.counts))) if run.counts else NOTHING
    cells = [*(figure.write(figure.value(run)) for figure in FIGURES), interval, hardware(run)]
    look = look_of(number)
    return Row(run.name, cells, series=look.color, finished=run.summary is not None, marker=look.character)


def _spread_row(runs: Sequence[Run], name: str, over: Callable[[Sequence[float]], float]) -> Row:
    """A row with the mean or standard deviation (`over`) of each figure, or a dash if a run lacks the figure."""
    cells = []
    for figure in FIGURES:
        values = [value for run in runs if (value := figure.value(run)) is not None]
        cells.append(figure.write(over(values)) if len(values) == len(runs) else NOTHING)
    return Row(name, [*cells, "", ""], series=None)


def _images(run: Run, split: str) -> str:
    """The images of a split: where they come from, how many there are, and the start of the sha256 of their file."""
    recorded = run.dataset.splits.get(split)
    return f"{run.dataset.source} {recorded.count} ({recorded.sha256[:8]})" if recorded else NOTHING


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Each setting in which the runs differ, except those in LEFT_OUT, and its value in each run.

    Further rows describe the datasets, precisions and numbers of processes, if they differ.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in {*LEFT_OUT, "precision"})
    values = {
        name.replace("_", "-"): [plain(run.settings[name]) if name in run.settings else NOTHING for run in runs]
        for name in names
    }
    values["precision"] = [run.precision or NOTHING for run in runs]
    values["processes"] = [str(run.world_size) for run in runs]
    values["classes"] = [str(len(run.classes)) for run in runs]
    for split in ("train", "test"):
        values[f"{split} images"] = [_images(run, split) for run in runs]
    return [(name, row) for name, row in values.items() if len(set(row)) > 1]
