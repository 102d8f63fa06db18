"""From the words of a command line to a checked configuration, with every fault told in one line.

tyro makes the flags from the configuration's fields and docstrings; its framed, many-line error reports are folded.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from data_prep.errors import InputError
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.launch import prints_errors

Section = TypeVar("Section")


def parse_command_line(
    argv: Sequence[str], recipes: Mapping[str, TrainConfig], *, prog: str, description: str
) -> TrainConfig:
    """`[RECIPE] [--flag value ...]` -> configuration.

    Raises InputError, in one line, for an unknown recipe, an unknown flag or an impossible value. `--help` prints
    and exits 0.
    """
    recipe, arguments = take_recipe(argv, recipes)
    return parse_flags(TrainConfig, arguments, prog=f"{prog} [RECIPE]", description=description, default=recipe)


def take_recipe(argv: Sequence[str], recipes: Mapping[str, TrainConfig]) -> tuple[TrainConfig, list[str]]:
    """(the recipe named by the first word, or baseline; the other words). Raises InputError for an unknown one."""
    arguments = list(argv)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "baseline"
    if name not in recipes:
        raise InputError(f"unknown recipe '{name}': choose from {', '.join(recipes)}")
    return recipes[name], arguments


def parse_flags(
    section: type[Section],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None = None,
    default: Section | None = None,
) -> Section:
    """Flags -> an instance of a configuration dataclass; tyro's framed error reports become one-line InputErrors."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                section,
                args=argv,
                default=default,
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
            assert parsed is not None
            return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{_one_line(said.getvalue())} (--help lists the flags)") from None


def _one_line(boxed: str) -> str:
    """The first message in tyro's framed, many-line error report, without the frame and its title."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    text = " ".join(re.sub(r"^╭.*$|[─-╿]", " ", plain, flags=re.MULTILINE).split())
    return re.split(" For full helptext| Argument helptext", text)[0] or "the command line is not understood"


def run_command(work: Callable[[], object]) -> int:
    """Exit status of a command: 0, or 2 after an InputError, which is printed as one line.

    Every process finds the same fault, so only the first process of each machine prints it.
    """
    try:
        work()
    except InputError as error:
        if prints_errors():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def program_name(module: str) -> str:
    """How the user started `module`, for usage lines."""
    return f"{Path(sys.executable).name} -m {module}"
