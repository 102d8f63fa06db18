"""The file of a sweep, and the table of its results.

`python -m slurm.sweep check SETTINGS`           the number of trainings, if every line is a valid one
`python -m slurm.sweep arguments SWEEP NUMBER`   the arguments of one of them, each ended by a zero byte
`python -m slurm.sweep table SWEEP`              mean, standard deviation and n over runs that differ in the seed only
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import InputError
from ddp_trainer.command_line import parse_command_line
from ddp_trainer.recipes import RECIPES
from ddp_trainer.report.sweep_table import TABLE, results_table

SETTINGS = "settings.txt"


def read_settings(path: Path) -> list[list[str]]:
    """The arguments of each training, by shell rules of quoting. Raises InputError, naming the line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a file with one training a line") from None
    trainings = []
    for number, line in enumerate(lines, 1):
        try:
            arguments = shlex.split(line, comments=True)
            if arguments:
                parse_command_line(arguments, RECIPES, prog="slurm/train.sh", description="")
                trainings.append(arguments)
        except SystemExit:
            raise InputError(f"{path}, line {number}: --help is no training") from None
        except (InputError, ValueError) as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not trainings:
        raise InputError(f"{path} holds no training: write one a line, such as: baseline --seed 1")
    return trainings


def arguments_of(sweep: Path, number: int) -> list[str]:
    """Those of training `number`, from 1, with its run directory. Raises InputError."""
    trainings = read_settings(sweep / SETTINGS)
    if not 1 <= number <= len(trainings):
        raise InputError(f"{sweep / SETTINGS} holds trainings 1 to {len(trainings)}, and this is array task {number}")
    return [*trainings[number - 1], "--out", str(sweep / f"run-{number}")]


def table_of(sweep: Path) -> str:
    """Raises InputError where a run directory is damaged."""
    trainings = read_settings(sweep / SETTINGS)
    return results_table([sweep / f"run-{number}" for number in range(1, len(trainings) + 1)])


def main(argv: Sequence[str]) -> int:
    try:
        match argv:
            case ["check", path]:
                print(len(read_settings(Path(path))))
            case ["arguments", sweep, number]:
                sys.stdout.write("".join(f"{argument}\0" for argument in arguments_of(Path(sweep), int(number))))
            case ["table", sweep]:
                table = table_of(Path(sweep))
                (Path(sweep) / TABLE).write_text(table)
                print(table, end="")
            case _:
                raise InputError("call it as " + ", or ".join(re.findall(r"`(python -m .+?)`", __doc__ or "")))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
