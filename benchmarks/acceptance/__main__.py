"""Checks a machine with GPUs in ten minutes, in stages: tests, speed measurements and whole recipes.

    python -m benchmarks.acceptance [--data-dir DIR] [--images PATH] [--out DIR] [--work DIR] [--seconds N] [--rehearse]

Each stage has a time limit, and is left out if this limit exceeds the remaining time. `acceptance.json` in --out is
rewritten after each stage, so an interrupted run keeps its measurements. The exit status is 0 if every stage that ran
has passed.

With --rehearse, every stage runs in its smallest form, on the CPU. This tests the stages, but says nothing about speed
or accuracy.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.acceptance.plan import Plan, all_stages
from benchmarks.acceptance.report import collect, print_tables
from benchmarks.acceptance.runner import Outcome, run_stages
from benchmarks.arguments import argument_parser
from benchmarks.results import count_usable_gpus, gpu_names
from data_prep.errors import require
from data_prep.files import write_json
from ddp_trainer.command_line import run_command

SECONDS = 600.0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        default=Path("data/cifar10"),
        help="prepared dataset, used if it exists; ignored with --rehearse",
    )
    add(
        "--images",
        type=Path,
        help="images to prepare if --data-dir has no dataset: a folder with train/ and test/, or a tar archive of it",
    )
    now = time.strftime("%Y%m%d-%H%M%S")
    add("--out", type=Path, default=Path(f"benchmarks/results/gpu-{now}"), help="folder for figures and logs")
    add("--work", type=Path, default=Path(f"runs/acceptance-{now}"), help="folder for data and runs")
    add("--seconds", type=float, default=SECONDS, help="time limit for all stages together, in seconds")
    add("--rehearse", action="store_true", help="run every stage in its smallest form, on the CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = parse(argv)
    message = "torch finds no usable GPU here; --rehearse runs every stage in its smallest form, on the CPU"
    gpus = 0 if options.rehearse else count_usable_gpus()
    require(options.rehearse or gpus > 0, message)
    for flag, folder in (("out", options.out), ("work", options.work)):
        require(not folder.exists() or not any(folder.iterdir()), f"--{flag} {folder} is not empty; name a new folder")
    ready = not options.rehearse and (options.data_dir / "dataset.json").exists()
    plan = Plan(
        data=(options.data_dir if ready else options.work / "data").resolve(),
        images=options.images and options.images.resolve(),
        out=options.out.resolve(),
        work=options.work.resolve(),
        gpus=gpus,
    )
    logs = plan.out / "logs"
    for folder in (logs, plan.work):
        folder.mkdir(parents=True, exist_ok=True)

    def report(outcomes: list[Outcome]) -> None:
        write_json(plan.out / "acceptance.json", collect(outcomes, plan, gpu_names(), time.monotonic() - started))

    left = options.seconds - (time.monotonic() - started)
    outcomes = run_stages(all_stages(plan), logs, seconds=left, report=report)
    print_tables(outcomes, plan)
    print(f"figures and logs: {plan.out}")
    return int(any(outcome.state not in ("passed", "left out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(run_command(main))
