"""`python -m ddp_trainer.sweep RECIPE --seeds N [--set flag=v1,v2]`: trainings one after another, and their table.

Every combination of the values is trained with every seed, each in a process and a run directory of its own, so that a
failure ends one of them only. The same command goes on where the last one was stopped.
"""

import argparse
import itertools
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import FrameType

from data_prep.errors import InputError
from ddp_trainer.command_line import parse_command_line, program_name, take_recipe
from ddp_trainer.config import FREE_ON_RESUME, require
from ddp_trainer.recipes import RECIPES
from ddp_trainer.report.loading import Run, load_run
from ddp_trainer.rundir import read_json
from ddp_trainer.signals import SIGNALS

TABLE = "table.md"
OWN_FLAGS = ("--seed", "--out", "--resume")  # of the trainer, set here for each training


@dataclass(frozen=True)
class Training:
    """One of the sweep."""

    name: str  # of its run directory
    arguments: list[str]  # of the trainer, without --out


@dataclass(frozen=True)
class Sweep:
    """All trainings, in the order they are run."""

    out: Path
    launcher: list[str]
    trainings: list[Training]

    @property
    def folders(self) -> list[Path]:
        return [self.out / training.name for training in self.trainings]


def parse(argv: Sequence[str]) -> Sweep:
    """Raises InputError, before anything is trained, where a value of any training cannot be."""
    recipe, rest = take_recipe(argv, RECIPES)
    parser = argparse.ArgumentParser(
        prog=f"{program_name('ddp_trainer.sweep')} [RECIPE]", allow_abbrev=False, exit_on_error=False,
        description="Trains a recipe with several seeds and settings, one after another; the same command again goes "
                    "on. Other flags are the trainer's, for all trainings.",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="train with seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FLAG=V1,V2",
                        help="values of a trainer's flag; true and false for switches; may be repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, metavar="DIR",
                        help="folder of the run directories and table.md (default: runs/sweep-RECIPE)")  # fmt: skip
    parser.add_argument("--launcher", default=f"{sys.executable} -m", metavar="COMMAND",
                        help='what starts it, such as "accelerate launch -m" (default: python -m)')  # fmt: skip
    try:
        flags, common = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    require(flags.seeds >= 1, f"--seeds {flags.seeds}: give at least 1")
    for flag in OWN_FLAGS:
        require(flag not in common, f"{flag} is set for each training by the sweep: leave it out")
    trainings = list_trainings(recipe.recipe, flags.settings, flags.seeds, common)
    for training in trainings:
        parse_command_line(training.arguments, RECIPES, prog="", description="")
    return Sweep(flags.out or Path("runs") / f"sweep-{recipe.recipe}", shlex.split(flags.launcher), trainings)


def list_trainings(recipe: str, settings: Sequence[str], seeds: int, common: Sequence[str]) -> list[Training]:
    """The seeds of one combination follow each other, so that its mean is known early. Raises InputError."""
    columns = []
    for setting in settings:
        flag, _, values = setting.partition("=")
        require(bool(flag and values), f"--set {setting}: give it as FLAG=VALUE,VALUE")
        columns.append([(flag.removeprefix("--"), value) for value in values.split(",")])
    columns.append([("seed", str(seed)) for seed in range(seeds)])
    trainings = []
    for pairs in itertools.product(*columns):
        words = [word for flag, value in pairs for word in _as_flag(flag, value)]
        name = ",".join(f"{flag}={value}".replace("/", "_") for flag, value in pairs)
        trainings.append(Training(name, [recipe, *common, *words]))
    return trainings


def _as_flag(flag: str, value: str) -> list[str]:
    if value in ("true", "false"):
        return [f"--{flag}" if value == "true" else f"--no-{flag}"]
    return [f"--{flag}", value]


def results_table(folders: Sequence[Path]) -> str:
    """A row for all complete runs that differ in the seed only. Raises InputError where a run directory is damaged."""
    runs = [load_run(folder) for folder in folders if (folder / "summary.json").exists()]
    groups: dict[str, list[Run]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        groups.setdefault(label, []).append(run)
    splits = " and ".join(sorted({run.split for run in runs})) or "test"
    lines = [
        f"| settings | n | mean {splits} accuracy | standard deviation | with TTA | standard deviation | PFLOP |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, group in groups.items():
        plain = [run.accuracy or 0.0 for run in group]
        views = [run.number("test_accuracy_tta") or 0.0 for run in group]
        operations = mean(run.number("train_pflops") or 0.0 for run in group)
        lines.append(f"| {label} | {len(group)} | {_mean_and_spread(plain)} | {_mean_and_spread(views)} | "
                     f"{operations:.3g} |")  # fmt: skip
    complete = {run.path for run in runs}
    missing = [folder.name for folder in folders if folder.resolve() not in complete]
    if missing:
        lines += ["", f"Not complete, and not in the table: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2%} | {f'{stdev(values):.2%}' if len(values) > 1 else '-'}"


def labels(runs: Sequence[Run]) -> list[str]:
    """For each run its values of the settings that differ; the seed, and what does not change the result, left out."""
    settings = [{"recipe": run.config.get("recipe"), **run.settings} for run in runs]
    names = dict.fromkeys(name for each in settings for name in each if name not in FREE_ON_RESUME | {"seed"})
    names = [name for name in names if len({str(each.get(name)) for each in settings}) > 1]
    return [", ".join(f"{name} {each.get(name)}" for name in names) or "all alike" for each in settings]


class Runner:
    """Runs trainings until one of them was asked to stop. Signals to this process reach the training at hand."""

    def __init__(self) -> None:
        self.stopped = False
        self._process: subprocess.Popen | None = None
        for number in SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(number)

    def train(self, launcher: Sequence[str], training: Training, out: Path) -> bool:
        """Whether it is complete now."""
        command = [*launcher, "ddp_trainer.train", *training.arguments, "--out", str(out), "--resume"]
        self._process = subprocess.Popen(command)
        self._process.wait()
        self._process = None
        return (out / "summary.json").exists()


def run(sweep: Sweep) -> int:
    """0: all are complete, or this was stopped; 1: one or more failed."""
    runner = Runner()
    total = len(sweep.trainings)
    for number, (training, folder) in enumerate(zip(sweep.trainings, sweep.folders, strict=True), 1):
        if not (folder / "summary.json").exists():
            print(f"[{number}/{total}] {training.name}", file=sys.stderr, flush=True)
            complete = runner.train(sweep.launcher, training, folder)
            if runner.stopped or (read_json(folder / "status.json") or {}).get("state") == "preempted":
                print("asked to stop: the same command goes on", file=sys.stderr, flush=True)
                return 0
            if not complete:
                print(f"error: {training.name} failed: see {folder}; the others go on", file=sys.stderr, flush=True)
    sweep.out.mkdir(parents=True, exist_ok=True)
    table = results_table(sweep.folders)
    (sweep.out / TABLE).write_text(table)
    print(table, end="")
    return 0 if all((folder / "summary.json").exists() for folder in sweep.folders) else 1


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # the training at hand got it too
        return 130


if __name__ == "__main__":
    sys.exit(main())
