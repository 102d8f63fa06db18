"""Plots the accuracy of recipes and of other projects against the PFLOP of a whole run.

    python -m benchmarks.accuracy_picture --picture docs/accuracy.png

The dicts RECIPES and OTHER_PROJECTS map each label to a result file. `collect_runs` writes the files of recipes.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.arguments import argument_parser
from ddp_trainer.command_line import run_command

RESULTS = Path(__file__).parent / "results"
RECIPES = {
    "fast": "fast_narrow.json",
    "strong": "strong_three_seeds.json",
    "long": "long.json",
    "baseline": "baseline.json",
}
OTHER_PROJECTS = {"airbench94_muon": "airbench94_muon.json"}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)  # PFLOP


class Point(NamedTuple):
    """The runs of one recipe or project. Accuracies are in percent, one per run."""

    pflops: float
    without_tta: list[float]
    with_tta: list[float]


def read_point(path: Path) -> Point:
    summaries = [run["summary"] for run in json.loads(path.read_text())["runs"]]
    return Point(
        pflops=summaries[0]["train_pflops"],
        without_tta=[100 * summary["test_accuracy"] for summary in summaries],
        with_tta=[100 * summary["test_accuracy_tta"] for summary in summaries],
    )


def draw_point(axes: Axes, name: str, point: Point, color: str, side: Literal["left", "right"]) -> None:
    """Draws two circles per run: hollow for accuracy without TTA (test-time augmentation), filled for accuracy with it.

    The label on the left or right `side` of the circles gives the mean with TTA.
    """
    for accuracies, fillstyle in ((point.without_tta, "none"), (point.with_tta, "full")):
        axes.plot([point.pflops] * len(accuracies), accuracies, "o", color=color, fillstyle=fillstyle)
    mean, count = statistics.mean(point.with_tta), len(point.with_tta)
    axes.annotate(
        f"{name}\n{mean:.2f} %, n = {count}",
        (point.pflops, mean),
        xytext=(8 if side == "right" else -8, 0),
        textcoords="offset points",
        color=color,
        va="center",
        ha="left" if side == "right" else "right",
    )


def draw(path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, file in RECIPES.items():
        draw_point(axes, name, read_point(RESULTS / file), "tab:blue", "right")
    for name, file in OTHER_PROJECTS.items():
        draw_point(axes, name, read_point(RESULTS / file), "tab:gray", "left")
    axes.set_xscale("log")
    axes.set_xlim(0.1, 14)
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.grid(visible=True, color="0.9")
    axes.set_xlabel("PFLOP of a whole run")
    axes.set_ylabel("test accuracy in % (filled: with TTA)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--picture", required=True, type=Path, help="draw the chart to this PNG or SVG file")
    draw(parser.parse_args(argv).picture)


if __name__ == "__main__":
    sys.exit(run_command(main))
