"""The table of a sweep, in Markdown. Each row summarizes the finished runs of one combination of settings."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from data_prep.errors import printable
from ddp_trainer.report.wording import NOTHING, percent, quantity
from ddp_trainer.tracking.run_record import Run, load_run

TABLE = "table.md"  # in the folder of the sweep
HEAD = "| settings | n | mean {} accuracy | standard deviation | with TTA | standard deviation | PFLOP |"


def results_table(planned: Mapping[str, Sequence[Path]]) -> str:
    """The table in Markdown. `planned`: for each combination of settings, its label and the folders of its runs.

    Raises InputError if a run directory is damaged.
    """
    groups = {label: _finished_runs(folders) for label, folders in planned.items()}
    runs = [run for group in groups.values() for run in group]
    splits = " and ".join(sorted({run.split for run in runs})) or "test"
    lines = [HEAD.format(splits), "| --- " * HEAD.count(" |") + "|"]
    for label, group in groups.items():
        if not group:
            continue
        center = _mean_and_spread([run.accuracy for run in group])
        views = _mean_and_spread([run.number("test_accuracy_tta") for run in group])
        operations = quantity(group[0].number("train_pflops"))
        settings = printable(label).replace("|", "\\|")  # a | would end the cell
        lines.append(f"| {settings} | {len(group)} | {center} | {views} | {operations} |")
    images = [frozenset(run.evaluated_images for run in group) for group in groups.values() if group]
    files = {(run.split, run.evaluated_images.sha256) for run in runs}
    # With --validation, the images also depend on the seed, so all rows must have runs with the same seeds.
    if len(files) > 1 or len(set(images)) > 1:
        lines += ["", "Warning: the runs were evaluated on different images."]
    finished = {run.path for run in runs}
    folders = [folder for group in planned.values() for folder in group]
    missing = [printable(folder.name) for folder in folders if folder.resolve() not in finished]
    if missing:
        lines += ["", f"Not finished, so not in the table: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _finished_runs(folders: Sequence[Path]) -> list[Run]:
    finished = [folder for folder in folders if os.path.exists(folder / "summary.json")]
    return [load_run(folder, with_predictions=False) for folder in finished]


def _mean_and_spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation as two cells of the table. A dash stands for a value that cannot be computed."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"{NOTHING} | {NOTHING}"
    return f"{percent(mean(known))} | {percent(stdev(known)) if len(known) > 1 else NOTHING}"
