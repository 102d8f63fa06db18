"""Sweep: `python -m ddp_trainer.sweep RECIPE --seeds N [--set FLAG=V1,V2]` trains a recipe several times.

Every combination of the values is trained with every seed, one run after another. Each run has its own process and run
directory, so a failure ends only that run. The same command continues a sweep that was stopped. `--list` only prints
the arguments of the runs, which `slurm/sweep.sh` submits as jobs. `--table` only writes and prints the table of the
finished runs.
"""

import argparse
import itertools
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.dataset import read_dataset
from data_prep.errors import InputError, require, require_printable
from data_prep.files import replace_file
from data_prep.output import out_folder
from ddp_trainer.command_line import (
    as_flags,
    parse_command_line,
    program_name,
    require_output,
    run_command,
    take_recipe,
)
from ddp_trainer.config import NO_DIFFERENCE
from ddp_trainer.distributed.launch import Launch
from ddp_trainer.report.sweep_table import TABLE, results_table
from ddp_trainer.run.checks import check_settings
from ddp_trainer.run.settings import changed_settings, dataset_settings, recorded_settings
from ddp_trainer.run.sweep_runs import PlannedRun, Runner, count_processes
from ddp_trainer.tracking.console import print_line

OWN_FLAGS = {"seed", "out", "resume"}  # trainer flags that the sweep sets for each run
SWITCH_VALUES = {"true": True, "false": False}  # of an on/off flag
MAX_NAME = 255  # bytes of a file name, on most file systems
LISTS = {"small-crops", "freeze", "freeze-late", "trackers"}  # trainer flags whose values may contain commas


@dataclass(frozen=True)
class Sweep:
    """All runs, in the order in which they are trained."""

    out: Path
    launcher: list[str]
    runs: list[PlannedRun]
    action: Literal["train", "list", "table"]


def parse(argv: Sequence[str]) -> Sweep:
    """The sweep that the command line describes. Raises InputError if the settings of any run are invalid."""
    recipe, rest = take_recipe(argv)
    try:
        flags, common = _flags_of(recipe.recipe).parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    fix = "start it with python -m, and name the launcher of its runs: --launcher 'accelerate launch -m'"
    require(Launch.from_environment().world_size == 1, f"the sweep itself must be a single process; {fix}")
    require(flags.seeds >= 1, f"--seeds must be at least 1, got {flags.seeds}")
    require_printable("out", flags.out)
    runs = plan_runs(recipe.recipe, flags.settings, flags.seeds, common, flags.out)
    launcher = _launcher_words(flags.launcher)
    world_size = count_processes(launcher) if flags.launcher else 1
    for run in runs:
        check(run, world_size=world_size)
    return Sweep(flags.out, launcher, runs, flags.action)


def _flags_of(recipe: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program_name('ddp_trainer.sweep')} [RECIPE]",
        allow_abbrev=False,
        exit_on_error=False,
        description="Train a recipe with several seeds and settings, one run after another. The same command continues "
        "a sweep that was stopped. Every flag that is not listed here is passed to the trainer, for all runs.",
    )
    add, out = parser.add_argument, Path("runs") / f"sweep-{recipe}"
    add("--seeds", type=int, default=3, metavar="N", help="train with seeds 0 to N - 1 (default: 3)")
    text = "values to try for a trainer flag (true and false for an on/off flag); repeat --set for more flags"
    add("--set", action="append", default=[], dest="settings", metavar="FLAG=V1,V2", help=text)
    text = "folder for the run directories and table.md (default: runs/sweep-RECIPE)"
    add("--out", type=out_folder, default=out, metavar="DIR", help=text)
    text = 'command that starts the trainer, such as "accelerate launch -m" (default: python -m)'
    add("--launcher", metavar="COMMAND", help=text)
    actions = parser.add_mutually_exclusive_group()
    for action, text in (
        ("list", "only print the arguments of each run, one run per line, quoted for the shell"),
        ("table", "only write and print the table of the finished runs"),
    ):
        actions.add_argument(
            f"--{action}", action="store_const", const=action, default="train", dest="action", help=text
        )
    return parser


def _launcher_words(command: str | None) -> list[str]:
    """The launcher's command as words (default: python -m). Raises InputError if its program does not exist."""
    if command is None:
        return [sys.executable, "-m"]
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--launcher {command}: {error}") from None
    require(bool(words) and shutil.which(words[0]) is not None, f"--launcher {command}: no such program")
    return words


def plan_runs(recipe: str, settings: Sequence[str], seeds: int, common: Sequence[str], out: Path) -> list[PlannedRun]:
    """All runs of the sweep. Runs that differ only in their seed follow one another, so that their mean is known early.

    Raises InputError for invalid flags.
    """
    columns = []
    for setting in settings:
        flag, _, values = setting.partition("=")
        require(bool(flag and values), f"--set must have the form FLAG=V1,V2, got {setting}")
        require(
            _flag_name(flag) not in LISTS or "," not in values,
            f"--set {flag} cannot have several values, because a value may contain commas; make a sweep for each value",
        )
        columns.append([(_flag_name(flag), value) for value in dict.fromkeys(values.split(","))])
    swept = [column[0][0] for column in columns]
    for flag in [*swept, *(_flag_name(word) for word in common if word.startswith("--"))]:
        require(flag not in OWN_FLAGS, f"--{flag} is set for each run by the sweep; leave it out")
        require(swept.count(flag) < 2, f"--set {flag}=... is given twice; give all values at once")
    columns.append([("seed", str(seed)) for seed in range(seeds)])
    runs = []
    for pairs in itertools.product(*columns):
        words = as_flags({flag: SWITCH_VALUES.get(value, value) for flag, value in pairs})
        name = ",".join(f"{flag}={value}".replace("/", "_") for flag, value in pairs)
        label = ", ".join(f"{flag} {value}" for flag, value in pairs[:-1]) or "same for all"  # without the seed
        runs.append(PlannedRun([recipe, *common, *words], out / name, label))
    _check_folder_names([run.out.name for run in runs])
    return runs


def _check_folder_names(names: Sequence[str]) -> None:
    """Raises InputError if a name is too long, or if two runs have the same name."""
    for name, count in Counter(names).items():
        size = len(os.fsencode(name))
        require(
            size <= MAX_NAME,
            f"--set: the folder name {name[:40]}... has {size} bytes, but the limit is {MAX_NAME}; shorten the values",
        )
        require(
            count == 1,
            f"--set: two values give the same folder name, {name}, because / becomes _; make one sweep for each value",
        )


def _flag_name(word: str) -> str:
    """The name of the flag in an argument, such as peak-lr in --peak_lr=1."""
    return word.removeprefix("--").partition("=")[0].replace("_", "-")


def check(run: PlannedRun, *, world_size: int) -> None:
    """Raises InputError if the run's settings are invalid, or if its folder has a finished run with other settings.

    The settings of an unfinished run are not compared here; the trainer compares them when it resumes the run.
    """
    config = parse_command_line(run.arguments, prog="", description="")
    dataset = read_dataset(config.data.data_dir)
    check_settings(config, dataset, world_size=world_size)
    if run.is_finished:
        kept = {name: value for name, value in config.flat().items() if name not in NO_DIFFERENCE}
        requested = {**kept, **dataset_settings(config, dataset)}
        for name, old, new in changed_settings(recorded_settings(run.out), requested):
            raise InputError(f"{run.out} was trained with {name} {old}, not {new}; choose another folder with --out")


def list_lines(sweep: Sweep) -> list[str]:
    """One line for each run: the trainer's arguments, quoted for the shell.

    Raises InputError if an argument has a line break.
    """
    commands = [[*run.arguments, "--out", str(run.out)] for run in sweep.runs]
    for word in itertools.chain.from_iterable(commands):
        require(
            "\n" not in word, f"{word!r} has a line break, but --list prints one run per line; choose another value"
        )
    return [shlex.join(words) for words in commands]


def train_all(sweep: Sweep) -> int:
    """Starts or resumes each run that is not complete (see `PlannedRun.is_complete`). Then writes the table.

    Returns the exit status, as `main` does.
    """
    runner = Runner(sweep.launcher)
    for number, run in enumerate(sweep.runs, 1):
        if not run.is_complete and not runner.stopped:
            print_line(f"[{number}/{len(sweep.runs)}] {run.out.name}", sys.stderr)
            runner.train(run, group=sweep.out.name)
            if not run.is_complete and not runner.stopped:
                print_line(f"error: {run.out.name} failed; continuing with the next run", sys.stderr)
    write_table(sweep)
    if runner.stopped:
        print_line("stopped; run the same command again to continue", sys.stderr)
    return 0 if runner.stopped or all(run.is_complete for run in sweep.runs) else 1


def write_table(sweep: Sweep) -> None:
    folders: dict[str, list[Path]] = {}
    for run in sweep.runs:
        folders.setdefault(run.label, []).append(run.out)
    table = results_table(folders)
    print(table, end="", flush=True)
    try:
        replace_file(sweep.out / TABLE, table.encode())
    except OSError as error:
        raise InputError(f"{sweep.out / TABLE} cannot be written: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if all runs are finished or the sweep was stopped, 1 if a run failed.

    After --list or --table, the status is 0, or 1 if stdout could not be written. For wrong input, it is 2.
    """

    def work() -> int:
        sweep = parse(sys.argv[1:] if argv is None else argv)
        if sweep.action == "list":
            print("\n".join(list_lines(sweep)))
            require_output()
            return 0
        try:
            sweep.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {sweep.out} cannot be written ({error.strerror}); choose another folder") from None
        if sweep.action == "table":
            write_table(sweep)
            require_output()
            return 0
        return train_all(sweep)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
