"""What the page says of several runs: a table with mean and spread over seeds, what differs, and common curves."""

from collections.abc import Callable, Sequence
from statistics import mean, stdev

from ddp_trainer.report.charts import THEMES
from ddp_trainer.report.page import escape, section, table
from ddp_trainer.report.reproduce import LEFT_OUT
from ddp_trainer.report.scores import wilson_interval
from ddp_trainer.report.sections import curves, finished_epochs, hardware, latest, train_seconds
from ddp_trainer.report.sweep_table import NO_DIFFERENCE
from ddp_trainer.report.wording import NOTHING, duration, four_digits, percent, quantity
from ddp_trainer.tracking.run_record import Run

Figure = tuple[str, Callable[[Run], float | None], Callable[[float | None], str]]

FIGURES: tuple[Figure, ...] = (
    ("accuracy", lambda run: run.accuracy, percent),
    ("with TTA", lambda run: run.number("test_accuracy_tta"), percent),
    ("loss", lambda run: latest(run, "test_loss"), four_digits),
    ("epochs", finished_epochs, quantity),
    ("time", train_seconds, duration),
    ("PFLOP", lambda run: run.number("train_pflops"), quantity),
    ("images/s", lambda run: latest(run, "images_per_second"), quantity),
)


def compare(runs: Sequence[Run]) -> str:
    heading = f'<p class="muted">Training report</p><h1>{len(runs)} runs side by side</h1>\n'
    return heading + summary(runs) + overview(runs) + differences(runs) + curves(list(runs))


def alike(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups of one training each, with other seeds; an incomplete run stays alone."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in {*NO_DIFFERENCE, "seed"}}
        recorded = [run.config.get(name) for name in ("dataset", "world_size", "precision")]
        same = (run.split, run.classes, repr(recorded), repr(sorted(settings.items())))
        groups.setdefault(same if run.summary is not None else run.path, []).append(run)
    return list(groups.values())


def summary(runs: Sequence[Run]) -> str:
    """The mean accuracy in large figures, where all complete runs are of one configuration."""
    groups = alike([run for run in runs if run.summary is not None])
    if len(groups) != 1 or len(groups[0]) < 2:
        return ""
    shares = [run.accuracy for run in groups[0] if run.accuracy is not None]
    said = (
        f"mean accuracy on the {escape(groups[0][0].split)} images over {len(shares)} runs"
        f'<br><span class="muted">standard deviation {percent(stdev(shares))}, from {percent(min(shares))} to '
        f"{percent(max(shares))}</span>"
    )
    return f'<div class="hero"><strong>{percent(mean(shares))}</strong><span>{said}</span></div>\n'


def overview(runs: Sequence[Run]) -> str:
    rows = []
    for group in alike(runs):
        rows += [describe_row(run, runs.index(run)) for run in group]
        if len(group) > 1:
            rows += [spread(group, "mean", mean), spread(group, "standard deviation", stdev)]
    head = ["run", *(name for name, _, _ in FIGURES), "95% interval", "hardware"]
    note = "Mean and sample standard deviation are over complete runs of one training, with different seeds."
    if len({run.split for run in runs}) > 1:
        note += " These runs were evaluated on different splits: compare their accuracy with care."
    return section(
        "Overview", f'<div class="card">{table(head, rows, numeric=1)}</div>', f'<p class="muted">{note}</p>'
    )


def describe_row(run: Run, number: int) -> list[str]:
    """Cells of the table; the swatch is the colour of the run's curves."""
    swatch = f'<i class="swatch" style="background:var(--series-{number % len(THEMES["light"].series)})"></i>'
    state = "" if run.summary is not None else ' <span class="muted">(not complete)</span>'
    values = [write(value(run)) for _, value, write in FIGURES]
    counts = run.counts
    interval = " to ".join(percent(end) for end in wilson_interval(*counts)) if counts and counts[1] else NOTHING
    return [swatch + escape(run.name) + state, *values, interval, escape(hardware(run))]


def spread(runs: Sequence[Run], name: str, over: Callable[[Sequence[float]], float]) -> list[str]:
    """A row of the table; a dash where a run lacks the figure."""
    cells = []
    for _, value, write in FIGURES:
        values = [number for run in runs if (number := value(run)) is not None]
        cells.append(write(over(values)) if len(values) == len(runs) else NOTHING)
    return [f"<b>{name}</b>", *(f"<b>{cell}</b>" for cell in cells), "", ""]


def differences(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in LEFT_OUT)
    rows = [
        [escape(name.replace("_", "-")), *(escape(run.settings.get(name, NOTHING)) for run in runs)]
        for name in names
        if len({str(run.settings.get(name)) for run in runs}) > 1
    ]
    if not rows:
        return section("Settings that differ", "<p>None.</p>")
    head = ["setting", *(escape(run.name) for run in runs)]
    return section("Settings that differ", f'<div class="card">{table(head, rows)}</div>')
