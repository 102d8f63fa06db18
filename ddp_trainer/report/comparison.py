"""What the page says of several runs: a table, their mean and spread, and curves on common axes."""

from collections.abc import Callable, Sequence
from statistics import mean, stdev

from ddp_trainer.report.charts import PANELS
from ddp_trainer.report.loading import Run
from ddp_trainer.report.page import escape, figure, section, table, themed_image
from ddp_trainer.report.pictures import panel_png
from ddp_trainer.report.scores import wilson_interval
from ddp_trainer.report.sections import NOTHING, duration, hardware, latest, percent, quantity, train_seconds

Figure = tuple[str, Callable[[Run], float | None], Callable[[float | None], str]]

FIGURES: tuple[Figure, ...] = (
    ("accuracy", lambda run: run.accuracy, percent),
    ("with TTA", lambda run: run.number("test_accuracy_tta"), percent),
    ("loss", lambda run: latest(run, "test_loss"), lambda value: NOTHING if value is None else f"{value:.4f}"),
    ("epochs", lambda run: run.number("epochs") or len(run.metrics), quantity),
    ("time", train_seconds, duration),
    ("PFLOP", lambda run: run.number("train_pflops"), quantity),
    ("images/s", lambda run: latest(run, "images_per_second"), quantity),
)


def compare(runs: Sequence[Run]) -> str:
    return f"<h1>{len(runs)} runs side by side</h1>\n" + overview(runs) + differences(runs) + common_curves(runs)


def overview(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        counts = run.counts
        interval = " to ".join(percent(end) for end in wilson_interval(*counts)) if counts and counts[1] else NOTHING
        state = "" if run.summary is not None else ' <span class="muted">(not complete)</span>'
        values = [write(value(run)) for _, value, write in FIGURES]
        evaluated = f"{counts[0]:,} / {counts[1]:,}" if counts else NOTHING
        rows.append([escape(run.name) + state, *values, evaluated, interval, escape(hardware(run))])
    complete = [run for run in runs if run.summary is not None]
    if len(complete) > 1:
        rows += [spread(complete, "mean", mean), spread(complete, "standard deviation", stdev)]
    head = ["run", *(name for name, _, _ in FIGURES), "correct", "95% interval", "hardware"]
    splits = {run.split for run in runs}
    note = f"Mean and sample standard deviation are over the {len(complete)} complete runs."
    if len(splits) > 1:
        note += " These runs were evaluated on different splits: compare their accuracy with care."
    return section("Overview", f'<div class="card">{table(head, rows, numeric=1)}</div>',
                   f'<p class="muted" style="margin-top:12px">{note}</p>')  # fmt: skip


def spread(runs: Sequence[Run], name: str, over: Callable[[Sequence[float]], float]) -> list[str]:
    """A row of the table; a dash where a run lacks the figure."""
    cells = []
    for _, value, write in FIGURES:
        values = [number for run in runs if (number := value(run)) is not None]
        cells.append(write(over(values)) if len(values) == len(runs) else NOTHING)
    return [f"<b>{name}</b>", *(f"<b>{cell}</b>" for cell in cells), "", "", ""]


def differences(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in ("out", "resume"))
    rows = [
        [escape(name), *(escape(run.settings.get(name, NOTHING)) for run in runs)]
        for name in names
        if len({str(run.settings.get(name)) for run in runs}) > 1
    ]
    if not rows:
        return section("Settings that differ", "<p>None.</p>")
    head = ["setting", *(escape(run.name) for run in runs)]
    return section("Settings that differ", f'<div class="card">{table(head, rows)}</div>')


def common_curves(runs: Sequence[Run]) -> str:
    names = ", ".join(run.name for run in runs)
    cards = "".join(
        figure(themed_image(lambda theme, name=name: panel_png(name, runs, theme), f"{name} for each epoch of {names}"))
        for name in PANELS
    )
    return section("Curves", f'<div class="grid two">{cards}</div>')
