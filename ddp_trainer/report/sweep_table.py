"""The table of a sweep, in Markdown. Each row summarizes the finished runs that differ only in their seeds."""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from data_prep.errors import printable
from data_prep.json_fields import Setting
from ddp_trainer.report.settings import NO_DIFFERENCE
from ddp_trainer.report.wording import NOTHING, percent, plain, quantity
from ddp_trainer.tracking.run_record import Run, load_run

TABLE = "table.md"  # in the folder of the sweep
HEAD = "| settings | n | mean {} accuracy | standard deviation | with TTA | standard deviation | PFLOP |"


def results_table(folders: Sequence[Path]) -> str:
    """The table in Markdown. Finished runs with the same label (see `labels`) share one row.

    Raises InputError if a run directory is damaged.
    """
    runs = [load_run(folder) for folder in folders if os.path.exists(folder / "summary.json")]
    groups: dict[str, list[Run]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        groups.setdefault(label, []).append(run)
    splits = " and ".join(sorted({run.split for run in runs})) or "test"
    lines = [HEAD.format(splits), "| --- " * HEAD.count(" |") + "|"]
    for label, group in groups.items():
        center = _mean_and_spread([run.accuracy for run in group])
        views = _mean_and_spread([run.number("test_accuracy_tta") for run in group])
        operations = quantity(group[0].number("train_pflops"))
        lines.append(f"| {label} | {len(group)} | {center} | {views} | {operations} |")
    finished = {run.path for run in runs}
    missing = [printable(folder.name) for folder in folders if folder.resolve() not in finished]
    if missing:
        lines += ["", f"Not finished, so not in the table: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation as two cells of the table. A dash stands for a value that cannot be computed."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"{NOTHING} | {NOTHING}"
    return f"{percent(mean(known))} | {percent(stdev(known)) if len(known) > 1 else NOTHING}"


def labels(runs: Sequence[Run]) -> list[str]:
    """A label for each run: its values of all settings that affect the result and differ between runs, except seed."""
    settings: list[dict[str, Setting]] = [{"recipe": run.recipe, **run.settings} for run in runs]
    unnamed = {*NO_DIFFERENCE, "seed"} - {"data_dir"}  # runs on different datasets must not share a row
    names = dict.fromkeys(name for each in settings for name in each if name not in unnamed)
    names = [name for name in names if len({str(each.get(name)) for each in settings}) > 1]
    return [", ".join(f"{name} {plain(each.get(name))}" for name in names) or "same for all" for each in settings]
