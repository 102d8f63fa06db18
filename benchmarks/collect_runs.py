"""Writes finished runs to a result file: their commands, commits, versions, final figures and figures of each epoch.

    python -m benchmarks.collect_runs RUN [RUN ...] --data TEXT --result FILE [--note TEXT]

docs/results.md and `benchmarks.accuracy_picture` take their figures from such files.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.arguments import argument_parser
from data_prep.errors import InputError
from data_prep.files import write_json
from ddp_trainer.command_line import run_command
from ddp_trainer.report.reproduce import train_command
from ddp_trainer.tracking.run_record import Run, load_runs


def describe(run: Run) -> dict[str, Any]:
    """What the result file says about a run. Raises InputError if the run is not finished."""
    if run.summary is None:
        raise InputError(f"{run.path} has no summary.json: continue the run with --resume until it is finished")
    return {
        "command": train_command(replace(run, data_dir="")),  # a path on this machine means nothing elsewhere
        "git_commit": run.git_commit,
        "world_size": run.world_size,
        "device": run.device,
        "precision": run.precision,
        "evaluated_on": run.split,
        "summary": rounded(run.summary),
        "epochs": [rounded(record) for record in run.metrics],
    }


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: int(value) if value.is_integer() else round(value, 6) for name, value in figures.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--data", required=True, help="which images the runs were trained and evaluated on, in words")
    parser.add_argument("--result", required=True, type=Path, help="write the JSON file here")
    parser.add_argument("--note", default="", help="conditions of the measurement, in words")
    options = parser.parse_args(argv)
    runs = load_runs(options.runs)
    content = {
        "date": date.today().isoformat(),
        "data": options.data,
        "note": options.note,
        "versions": runs[0].versions,
        "runs": [describe(run) for run in runs],
    }
    options.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.result, content)


if __name__ == "__main__":
    sys.exit(run_command(main))
