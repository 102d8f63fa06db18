"""Measures how time and peak memory grow with the number of images, the number of classes and the image size.

    python -m benchmarks.scaling [--axes NAME ...] [--parts NAME ...] [--work DIR] [--result FILE] [--picture FILE]
                                 [--quick]

prepare:    python -m data_prep --source folder, from JPEG files that already have the final size.
start:      a run, from the start of its process to the end of its first step.
epoch:      one epoch of images streamed from the file, with augmentation and a network that costs almost nothing.
evaluation: evaluation of the test images, with test-time augmentation. There is one test image for every
            ten training images.
checkpoint: saving a checkpoint to the disk, for the same network as in `epoch`.
run:        a whole run with a single step, including evaluation, results and report.
report:     python -m ddp_trainer.report for that run.

Each measurement runs in its own process. The output has an exponent for each cost: the cost is
proportional to size^exponent, where size is the number of images, of classes, or of pixels per image. The exponents are
computed from the two largest sizes. The largest dataset needs 10 GB in --work.
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arguments import argument_parser
from benchmarks.results import write_result
from benchmarks.scaling.images import Shape, write_images
from benchmarks.scaling.measure import Cost, cost_of
from ddp_trainer.command_line import run_command
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.hardware import resolve_device

AXES = {
    "images": [Shape(count, 10, 32) for count in (1000, 10_000, 50_000, 200_000)],
    "large images": [Shape(count, 10, 256) for count in (1000, 5000, 20_000)],
    "classes": [Shape(10_000, classes, 32) for classes in (10, 100, 1000)],
    "side": [Shape(2000, 10, side) for side in (32, 64, 128, 256, 512)],
}
QUICK = {"images": [Shape(count, 4, 32) for count in (64, 128)]}
PARTS = ("prepare", "start", "epoch", "evaluation", "checkpoint", "run", "report")

Costs = dict[str, Cost]


def command_of(part: str, folder: Path, side: int) -> list[str | Path]:
    python, data, run = [sys.executable, "-W", "ignore", "-m"], folder / "data", folder / "run"
    if part == "prepare":
        source = ("--source", "folder", "--root", folder / "images", "--size", str(side))
        return [*python, "data_prep", *source, "--out", data]
    if part == "report":
        return [*python, "ddp_trainer.report", run]
    # The part `report` reads the run directory of the part `run`, so the other parts use other folders.
    return [*python, "benchmarks.scaling.work", part, data, run if part == "run" else folder / part]


def measure_shape(shape: Shape, work: Path, parts: Sequence[str]) -> Costs:
    """The cost of each part for a dataset of this shape. Writes the images first, and removes all files at the end."""
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        write_images(folder / "images", shape)
        costs = {}
        for part in parts:
            costs[part] = cost_of(command_of(part, folder, shape.side), folder / f"{part}.log")
            print(f"{shape.name}: {part:10} {costs[part].seconds:8.2f} s {costs[part].megabytes:7.0f} MB", flush=True)
        return costs
    finally:
        shutil.rmtree(folder)


def size_along(axis: str, shape: Shape) -> int:
    """The quantity that grows along `axis`: images, classes or pixels per image."""
    return {"classes": shape.classes, "side": shape.side**2}.get(axis, shape.images)


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The exponent k in cost ~ size^k, from the last two sizes."""
    return math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])


def summarize(axis: str, measured: dict[Shape, Costs]) -> dict[str, float]:
    """Figures by name: seconds and megabytes of each part at each size, and their exponents."""
    figures = {}
    sizes = [size_along(axis, shape) for shape in measured]
    for part in next(iter(measured.values())):
        for kind in Cost._fields:
            costs = [getattr(of_shape[part], kind) for of_shape in measured.values()]
            for shape, cost in zip(measured, costs, strict=True):
                figures[f"{axis}: {shape.name}: {part} {kind}"] = cost
            figures[f"{axis}: {part} {kind} exponent"] = exponent(sizes, costs)
    return figures


def print_table(axis: str, measured: dict[Shape, Costs]) -> None:
    shapes, parts = list(measured), list(next(iter(measured.values())))
    sizes = [size_along(axis, shape) for shape in shapes]
    labels = [shape.side if axis == "side" else size for shape, size in zip(shapes, sizes, strict=True)]
    print(f"\n| {axis} | {' | '.join(f'{label:,}' for label in labels)} | exponent |")
    print(f"| --- | {' | '.join('---' for _ in labels)} | --- |")
    for kind, unit in (("seconds", "s"), ("megabytes", "MB")):
        for part in parts:
            costs = [getattr(measured[shape][part], kind) for shape in shapes]
            cells = " | ".join(f"{cost:.{2 if unit == 's' else 0}f}" for cost in costs)
            print(f"| {part}, {unit} | {cells} | {exponent(sizes, costs):.2f} |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="what to vary; default: all")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="parts to measure, in the given order; prepare must come first, and report after run; default: all",
    )
    parser.add_argument("--work", type=Path, help="folder for the datasets; default: the system's temporary folder")
    parser.add_argument("--result", type=Path, help="write the figures here as JSON, after each axis")
    parser.add_argument("--picture", type=Path, help="draw a chart of the results to this PNG or SVG file")
    parser.add_argument("--quick", action="store_true", help="use two tiny datasets, to check that everything works")
    options = parser.parse_args(argv)
    axes = QUICK if options.quick else {axis: AXES[axis] for axis in options.axes}
    everything, figures = {}, {}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for axis, shapes in axes.items():
            measured = {shape: measure_shape(shape, Path(work), options.parts) for shape in shapes}
            everything[axis] = measured
            figures |= summarize(axis, measured)
            if options.result:
                device = resolve_device(RuntimeConfig())
                write_result(options.result, figures, device=device, data_mode="stream")
    for axis, measured in everything.items():
        print_table(axis, measured)
    if options.picture:
        from benchmarks.scaling.picture import draw

        draw(everything, options.picture)


if __name__ == "__main__":
    sys.exit(run_command(main))
