"""`python -m ddp_trainer.sweep RECIPE --seeds N [--set flag=v1,v2]`: trainings one after another, and their table.

Every combination of the values is trained with every seed, each in a process and a run directory of its own, so that a
failure ends one of them only. The same command goes on where the last one was stopped.
"""

import argparse
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from data_prep.dataset import read_dataset
from data_prep.errors import InputError, require
from data_prep.files import read_json
from ddp_trainer.command_line import parse_command_line, program_name, take_recipe
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.signals import on_request_to_stop
from ddp_trainer.recipes import RECIPES
from ddp_trainer.report.sweep_table import NO_DIFFERENCE, TABLE, results_table
from ddp_trainer.run.checks import check_dataset
from ddp_trainer.run.directory import changed_settings, recorded_settings

OWN_FLAGS = {"seed", "out", "resume"}  # of the trainer, set here for each training


@dataclass(frozen=True)
class Training:
    """One of the sweep."""

    arguments: list[str]  # of the trainer, without --out
    out: Path  # its run directory

    @property
    def complete(self) -> bool:
        return (self.out / "summary.json").exists()

    @property
    def done(self) -> bool:
        """Complete, and its report written too."""
        return self.complete and (read_json(self.out / "status.json") or {}).get("state") == "done"


@dataclass(frozen=True)
class Sweep:
    """All trainings, in the order they are run."""

    out: Path
    launcher: list[str]
    trainings: list[Training]


def parse(argv: Sequence[str]) -> Sweep:
    """Raises InputError, before anything is trained, where one process could not do any of the trainings."""
    recipe, rest = take_recipe(argv, RECIPES)
    parser = argparse.ArgumentParser(
        prog=f"{program_name('ddp_trainer.sweep')} [RECIPE]",
        allow_abbrev=False,
        exit_on_error=False,
        description="Trains a recipe with several seeds and settings, one after another; the same command again goes "
        "on. Other flags are the trainer's, for all trainings.",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="train with seeds 0 to N - 1 (default: 3)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="FLAG=V1,V2",
        help="values of a trainer's flag; true and false for switches; may be repeated",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / f"sweep-{recipe.recipe}",
        metavar="DIR",
        help="folder of the run directories and table.md (default: runs/sweep-RECIPE)",
    )
    parser.add_argument(
        "--launcher",
        default=None,
        metavar="COMMAND",
        help='what starts it, such as "accelerate launch -m" (default: python -m)',
    )
    try:
        flags, common = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    require(flags.seeds >= 1, f"--seeds {flags.seeds}: give at least 1")
    trainings = list_trainings(recipe.recipe, flags.settings, flags.seeds, common, flags.out)
    for training in trainings:
        check(training)
    return Sweep(flags.out, launcher_words(flags.launcher), trainings)


def launcher_words(command: str | None) -> list[str]:
    """Raises InputError where there is no such program."""
    if command is None:
        return [sys.executable, "-m"]
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--launcher {command}: {error}") from None
    require(bool(words) and shutil.which(words[0]) is not None, f"--launcher {command}: no such program")
    return words


def list_trainings(
    recipe: str, settings: Sequence[str], seeds: int, common: Sequence[str], out: Path
) -> list[Training]:
    """The seeds of one combination follow each other, so that its mean is known early. Raises InputError."""
    columns = []
    for setting in settings:
        flag, _, values = setting.partition("=")
        require(bool(flag and values), f"--set {setting}: give it as FLAG=VALUE,VALUE")
        columns.append([(_flag_name(flag), value) for value in dict.fromkeys(values.split(","))])
    swept = [column[0][0] for column in columns]
    for flag in [*swept, *(_flag_name(word) for word in common if word.startswith("--"))]:
        require(flag not in OWN_FLAGS, f"--{flag} is set for each training by the sweep: leave it out")
        require(swept.count(flag) < 2, f"--set {flag}=...: give all its values at once")
    columns.append([("seed", str(seed)) for seed in range(seeds)])
    trainings = []
    for pairs in itertools.product(*columns):
        words = [word for flag, value in pairs for word in _as_flag(flag, value)]
        name = ",".join(f"{flag}={value}".replace("/", "_") for flag, value in pairs)
        trainings.append(Training([recipe, *common, *words], out / name))
    return trainings


def _flag_name(word: str) -> str:
    """--peak_lr=1 -> peak-lr"""
    return word.removeprefix("--").partition("=")[0].replace("_", "-")


def _as_flag(flag: str, value: str) -> list[str]:
    if value in ("true", "false"):
        return [f"--{flag}" if value == "true" else f"--no-{flag}"]
    return [f"--{flag}", value]


def check(training: Training) -> None:
    """Raises InputError where it cannot be, or where its folder holds another training that is complete.

    What is not complete the trainer itself compares, when it goes on with it.
    """
    config = parse_command_line(training.arguments, RECIPES, prog="", description="")
    dataset = read_dataset(config.data.data_dir)
    check_dataset(config, dataset)
    if training.complete:
        asked = _settings(config, dataset.splits["train"].sha256)
        for name, old, new in changed_settings(recorded_settings(training.out), asked):
            said = f"{training.out} was trained with {name} {old}, not {new}"
            raise InputError(f"{said}: name another folder by --out")


def _settings(config: TrainConfig, images: str) -> dict[str, object]:
    """What makes it another training."""
    kept = {name: value for name, value in config.flat().items() if name not in NO_DIFFERENCE}
    return {**kept, "training images": images}


class Runner:
    """Runs trainings until it is asked to stop. Signals to this process reach the training at hand."""

    def __init__(self, launcher: list[str]) -> None:
        self.launcher, self.stopped = launcher, False
        self._process: subprocess.Popen | None = None
        on_request_to_stop(self._pass_on)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(number)

    def train(self, training: Training) -> None:
        """Returns when it is complete, or has failed, or was stopped; then `stopped` holds."""
        command = [*self.launcher, "ddp_trainer.train", *training.arguments, "--out", str(training.out), "--resume"]
        process = self._process = subprocess.Popen(command)
        if self.stopped:  # before there was a process to tell
            process.terminate()
        code = process.wait()
        self._process = None
        if code == 0 and not training.complete:  # somebody else told it to stop
            self.stopped = True


def run(sweep: Sweep) -> int:
    """0: all are complete, or this was stopped; 1: one or more failed."""
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {sweep.out}: cannot be written ({error.strerror}); name another folder") from None
    os.environ.setdefault("WANDB_RUN_GROUP", sweep.out.name)
    runner, total = Runner(sweep.launcher), len(sweep.trainings)
    for number, training in enumerate(sweep.trainings, 1):
        if not training.done and not runner.stopped:
            say(f"[{number}/{total}] {training.out.name}")
            runner.train(training)
            if not training.complete and not runner.stopped:
                say(f"error: {training.out.name} failed; the others go on")
    table = results_table([training.out for training in sweep.trainings])
    (sweep.out / TABLE).write_text(table)
    print(table, end="", flush=True)
    if runner.stopped:
        say("asked to stop: the same command goes on")
    return 0 if runner.stopped or all(training.complete for training in sweep.trainings) else 1


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # while the trainings are checked: later it is a request to stop
        return 130


if __name__ == "__main__":
    sys.exit(main())
